"""What judges the implementations: inputs, oracle, clock, limits, environment, journal, summary."""
