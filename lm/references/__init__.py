"""What a model is compared with: second models, stored scores, inspection."""
