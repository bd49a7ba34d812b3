"""The verbs: each parses, validates, imports the heavy stack late, and makes one call."""
