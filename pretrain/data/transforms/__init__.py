"""Views: what is drawn at random, and how it is rendered on the CPU or the device."""
