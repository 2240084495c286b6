"""Accurate arithmetic, and detection of what traces it. Nothing here depends on a distribution."""
