"""Studies of many runs: ablations, their outcomes and comparison, fitted laws."""
