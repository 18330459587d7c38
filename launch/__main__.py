"""`python -m plait.launch` is the `plait` command; torchrun starts it in this form."""

from .cli import main

if __name__ == "__main__":
    main()
