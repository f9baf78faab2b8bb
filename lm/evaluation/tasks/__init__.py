"""Tasks in the form of lm_eval's local ones, evaluated on models of this repository."""
