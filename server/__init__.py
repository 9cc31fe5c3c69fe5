"""What runs at the operator."""
