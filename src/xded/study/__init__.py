"""Studies: a question as a file of attempts, folds, seeds and hypotheses; run, and answered with intervals."""
