"""Ray actors and tasks that the stages share: engines, reward models, attacked pictures."""
