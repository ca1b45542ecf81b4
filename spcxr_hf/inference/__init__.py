"""From image files to answers, records and pictures."""
