"""Demo: a local page on which a browser shows what one or two trained models see in a picture."""
