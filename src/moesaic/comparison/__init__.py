"""Methods x budgets x memory on one model, measured in one way."""
