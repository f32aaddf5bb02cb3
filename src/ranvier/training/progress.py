"""What a user sees and keeps while training: a progress bar, metrics.jsonl, TensorBoard."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ranvier.atomic import replacing


class Display:
    """Progress bar over all updates of a run, and one line per finished epoch.

    Args:
        total: Updates of the whole run.
        done: Updates already made, when resuming.
        show: False in all processes but the first, and where no output is wanted.
    """

    def __init__(self, total: int, done: int, *, show: bool) -> None:
        self.show = show
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (show and self.console.is_terminal),
        )
        self.task = self.bar.add_task("starting", total=total, completed=done, state="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, step: int, epoch: int, epochs: int, state: str) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=step, description=f"epoch {epoch}/{epochs}", state=state)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.show:
            self.console.print(line, highlight=False, soft_wrap=True)


class Metrics:
    """Appends records to metrics.jsonl and, if asked for, to TensorBoard.

    Args:
        folder: Where the file is; None keeps nothing.
        history: Records before the point where training resumes; anything later in the file is dropped, because it will
            be made again.
        tensorboard: Whether to write TensorBoard events beside it.
    """

    def __init__(self, folder: Path | None, history: list[dict[str, Any]], *, tensorboard: bool = False) -> None:
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.writer = _summary_writer(folder) if folder is not None and tensorboard else None
        if self.path is not None:
            with replacing(self.path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in history))

    def add(self, record: dict[str, Any]) -> None:
        """Keep the record of one epoch."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        if self.writer is not None:
            for name, value in record.items():
                if name == "accuracy":
                    for t, accuracy in enumerate(value, 1):
                        self.writer.add_scalar(f"accuracy/T{t}", accuracy, record["epoch"])
                elif isinstance(value, int | float):
                    self.writer.add_scalar(name, value, record["epoch"])
            self.writer.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.writer is not None:
            self.writer.close()


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard is not installed. Install it: pip install 'ranvier[tensorboard]'.") from error
    return SummaryWriter(str(folder / "tensorboard"))
