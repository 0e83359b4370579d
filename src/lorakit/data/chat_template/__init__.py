"""Chat templates: selection, rendering to text and ids, and limits on what a template may do."""
