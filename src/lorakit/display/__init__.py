"""Rich renderables and charts for terminals, notebooks and HTML pages."""
