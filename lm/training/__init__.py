"""Joins the model, the data and the objective into runs."""
