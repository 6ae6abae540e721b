"""What a run costs and does, for people: accounting, metrics, pictures."""
