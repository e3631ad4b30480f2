"""Pictures over HTTP: an engine that knows no HTTP, what is asked of it, and the server around it.

`limits`, `adapters`, `asked`, `asked_edits` say what may be asked and what comes of it; `drawer` draws it,
`engine` batches and queues it, `store` keeps what is to be kept in a `database`; `problems`, `log`,
`metrics`, `gate`, `watched`, `parts`, `openapi`, `reading`, `course`, `reply`, `comparing`, `stream`,
`answering`, `routes`, `history`, `judging`, `votes_csv` and `page` are HTTP; `connection` and `run` are the
process.
"""
