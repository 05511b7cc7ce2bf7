"""The paper's tables beside ours, from result files alone: no model is loaded."""
