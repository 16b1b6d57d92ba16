//! Reads batch files: JSON lines, each of which becomes an item of a batch.
//!
//! Three forms of line are read, and each field that is not known is refused by its name:
//!
//! ```json
//! {"id": …, "prompt": …, "options": {…}}
//! {"id": …, "messages": [{"role": …, "content": …}], "options": {…}}
//! {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": …, "max_tokens": …}}
//! ```

mod body;
mod fields;
mod lines;
mod options;

pub(crate) use lines::BatchReader;
