"""The model as the compiler sees it: sites, targets, layer graphs, branches."""
