"""`python -m ranvier`, and `accelerate launch -m ranvier`."""

from ranvier.cli import main

if __name__ == "__main__":
    main()
