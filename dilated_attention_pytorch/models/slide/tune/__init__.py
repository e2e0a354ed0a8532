"""Tuning a slide encoder on labels: the table, the tasks, folds by patient, what is trained, and the loop."""
