"""Fine-tuning beside frozen parameters, as functions from trees to trees."""
