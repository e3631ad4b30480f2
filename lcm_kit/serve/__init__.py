"""Pictures over HTTP: an engine that knows no HTTP, what is asked of it, and the server around it.

`limits`, `adapters`, `asked`, `asked_edits` say what may be asked and what comes of it; `drawer` draws it,
`engine` batches and queues it; `problems`, `log`, `metrics`, `gate`, `watched`, `reading`, `course`, `reply`,
`stream`, `answering`, `routes` are HTTP; `run` is the process.
"""
