"""What can be known before a job starts: does the head answer, do the nodes fit, is there room."""
