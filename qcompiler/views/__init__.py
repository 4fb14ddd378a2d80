"""Pictures of a compilation: the HTML report and the trace for Perfetto."""
