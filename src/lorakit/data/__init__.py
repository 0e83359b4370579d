"""Files enter; tokenized examples with the right labels and a report leave.

Order: read (source -> Row) -> formats (Row -> Conversation or Document) -> check (faults counted)
-> template (Conversation -> Example, the one place where tokens and mask are made) and chunk
(Document -> Examples) -> split (held-out part) -> batch (Examples -> padded tensors).
`prepare` runs them; `show` prints an example with its trained tokens marked.
"""
