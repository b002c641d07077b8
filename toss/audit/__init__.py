"""What tests and shows the method. The method itself imports nothing from here."""
