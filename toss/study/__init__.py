"""What stands behind our claims. Nobody who uses TOSS needs it, and nothing else imports it."""
