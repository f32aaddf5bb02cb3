"""What a conversion shows on the terminal while it works."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """A progress bar that counts passes over layers and says what the present one is for.

    Args:
        wanted: Whether to show it; it is shown on a terminal only.
    """

    def __init__(self, wanted: bool) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        hidden = not (wanted and console.is_terminal)
        self.bar = Bar(*columns, console=console, transient=True, disable=hidden)
        self.task = self.bar.add_task("converting", total=None)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def expect(self, passes: int) -> None:
        """Say how many more passes there will be."""
        self.bar.update(self.task, total=passes, completed=0)

    def show(self, what: str) -> None:
        """Begin the next pass."""
        self.bar.update(self.task, description=what, advance=1)

    def note(self, what: str) -> None:
        """Say what goes on besides the passes."""
        self.bar.update(self.task, description=what)
