"""What the models learn: prompts, answers, counterfactual pairs and the latents behind them."""
