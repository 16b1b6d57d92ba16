use std::collections::HashMap;
use std::io::{self, BufRead, Read};

use unisono_client::v1::Item;

use super::body::item_of;
use super::fields::{Fields, Problem};

/// Longer lines cannot become an item that the service takes.
const MAX_LINE_BYTES: usize = 16 << 20;
const MAX_ID_BYTES: usize = 256;

/// Why there is no item.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// A line is none. The lines after it can still be read.
    #[error("line {line}: {problem}")]
    Line {
        /// The line's number, from 1.
        line: u64,
        problem: Problem,
    },
    /// The file cannot be read any further.
    #[error("{0}")]
    File(#[from] io::Error),
}

/// Gives the items of a batch file.
pub(crate) struct BatchReader<R> {
    source: R,
    number: u64,
    /// The line of each id that was given.
    line_of: HashMap<String, u64>,
    is_over: bool,
}

impl<R: BufRead> BatchReader<R> {
    /// Reads no further than it has to.
    pub(crate) fn new(source: R) -> Self {
        Self { source, number: 0, line_of: HashMap::new(), is_over: false }
    }

    /// What the next line becomes; `None` at the end. An empty line is no item, and no problem either.
    fn next_line(&mut self) -> Option<Result<Option<Item>, ReadError>> {
        let mut line = Vec::new();
        let read = match self.read_line(&mut line) {
            Ok(0) => return None,
            Ok(read) => read,
            Err(error) => return Some(Err(error.into())),
        };
        self.number += 1;
        let item = if read > MAX_LINE_BYTES {
            Err(Problem(format!("is longer than {MAX_LINE_BYTES} bytes")))
        } else {
            self.parse(&line)
        };
        Some(item.map_err(|problem| ReadError::Line { line: self.number, problem }))
    }

    /// Reads a line, of which no more is kept than may be long. Returns how many bytes were kept; 0 at the end.
    fn read_line(&mut self, line: &mut Vec<u8>) -> io::Result<usize> {
        let most = MAX_LINE_BYTES + 1;
        let read = self.source.by_ref().take(most as u64).read_until(b'\n', line)?;
        if line.ends_with(b"\n") {
            return Ok(read.min(MAX_LINE_BYTES));
        }
        if read == most {
            self.source.skip_until(b'\n')?;
        }
        Ok(read)
    }

    fn parse(&mut self, line: &[u8]) -> Result<Option<Item>, Problem> {
        let text = str::from_utf8(line).map_err(|_| Problem("is not UTF-8".to_owned()))?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        let mut fields = Fields::parse(text)?;
        let item_id = self.take_id(&mut fields)?;
        let item = item_of(&mut fields)?;
        fields.end()?;
        // Only ids of items that are sent are taken: a line that was refused keeps no other from using its id.
        self.line_of.insert(item_id.clone(), self.number);
        Ok(Some(Item { item_id, ..item }))
    }

    /// Takes the line's id, or makes one of its number.
    fn take_id(&self, fields: &mut Fields) -> Result<String, Problem> {
        let mut names = ["id", "item_id", "custom_id"].into_iter().filter(|name| fields.has(name));
        let (name, again) = (names.next(), names.next());
        drop(names);
        if let Some(again) = again {
            return Err(fields.problem(again, "says again what another id says"));
        }
        let id = match name {
            Some(name) => id_of(fields, name)?,
            None => format!("line-{}", self.number),
        };
        match self.line_of.get(&id) {
            Some(line) => Err(fields.problem("", &format!("{id:?} is the id of line {line} already"))),
            None => Ok(id),
        }
    }
}

impl<R: BufRead> Iterator for BatchReader<R> {
    type Item = Result<Item, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let next = std::iter::from_fn(|| self.next_line()).find_map(Result::transpose);
        self.is_over = matches!(next, None | Some(Err(ReadError::File(_))));
        next
    }
}

/// Takes a text, or a whole number as its digits.
fn id_of(fields: &mut Fields, name: &str) -> Result<String, Problem> {
    let digits = fields.as_written(name).filter(|written| written.parse::<i64>().is_ok());
    if let Some(digits) = digits.map(str::to_owned) {
        fields.take(name);
        return Ok(digits);
    }
    let id = fields.text(name)?;
    if id.is_empty() {
        Err(fields.problem(name, "is empty; leave it out to have the line's number for an id"))
    } else if id.len() > MAX_ID_BYTES {
        Err(fields.problem(name, &format!("is longer than {MAX_ID_BYTES} bytes")))
    } else if id.contains(char::is_control) {
        Err(fields.problem(name, "must not hold control characters"))
    } else {
        Ok(id)
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
