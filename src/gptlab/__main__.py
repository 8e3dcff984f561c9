"""`python -m gptlab`."""

from gptlab.cli import main

if __name__ == "__main__":
    main()
