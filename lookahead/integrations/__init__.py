"""Our drafts, pools and structured output inside other systems; each file needs the system that it is named after."""
