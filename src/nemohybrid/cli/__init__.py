"""Commands, one file each; `nemohybrid.__main__` dispatches."""
