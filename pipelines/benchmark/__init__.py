"""`benchmark`: what this machine does, contenders side by side in one run; a report in Markdown, and every sample."""
