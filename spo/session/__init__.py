"""What a job has to know about the cluster: its head, its nodes, room on them, shared storage."""
