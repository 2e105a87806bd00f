"""Any Mixture-of-Experts made cheaper: how many experts run for each token, learnt or calibrated to a budget."""
