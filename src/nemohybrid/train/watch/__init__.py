"""Who watches the ranks of a job: where each one is, which of them holds the others up, and how a job that hangs ends."""
