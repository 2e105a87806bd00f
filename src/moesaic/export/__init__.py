"""What stands beside a converted model's weights: the model card and plots."""
