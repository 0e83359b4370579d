"""Rich renderables and charts of what lorakit found, for terminals, notebooks and HTML pages."""
