use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

/// Why a line is no item: what is wrong, after the field's path.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub(crate) struct Problem(pub(super) String);

/// The fields of one JSON object.
///
/// Each is taken by name and type; [`end`](Self::end) refuses what nobody took, so a field that is not known cannot
/// be passed over in silence. Members are kept as they are written: a seed of 64 bits keeps its last digits, and a
/// schema the order of its keys.
pub(super) struct Fields {
    path: String,
    left: BTreeMap<String, Box<RawValue>>,
}

impl Fields {
    /// Reads a JSON object and nothing after it.
    pub(super) fn parse(text: &str) -> Result<Self, Problem> {
        let whole: &RawValue = serde_json::from_str(text).map_err(|error| not_json(&error))?;
        if holds_half_of_a_pair(whole.get()) {
            return Err(Problem("holds half of a surrogate pair, which is not Unicode text".to_owned()));
        }
        Self::open(String::new(), whole.get())
    }

    /// `text` is known to be JSON.
    fn open(path: String, text: &str) -> Result<Self, Problem> {
        let mut fields = Self { path, left: BTreeMap::new() };
        if !text.starts_with('{') {
            return Err(fields.problem("", "must be a JSON object"));
        }
        fields.left = serde_json::from_str(text).map_err(|error| not_json(&error))?;
        // null says nothing, so it is as good as absent.
        fields.left.retain(|_, member| member.get() != "null");
        Ok(fields)
    }

    /// What is wrong with a field; an empty name stands for the object itself.
    pub(super) fn problem(&self, name: &str, problem: &str) -> Problem {
        match self.at(name).as_str() {
            "" => Problem(problem.to_owned()),
            path => Problem(format!("{path}: {problem}")),
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.left.contains_key(name)
    }

    /// A member as it is written; it stays.
    pub(super) fn as_written(&self, name: &str) -> Option<&str> {
        self.left.get(name).map(|member| member.get())
    }

    /// Takes a member out, as it is written.
    pub(super) fn take(&mut self, name: &str) -> Option<Box<RawValue>> {
        self.left.remove(name)
    }

    /// Takes a text; empty where it is absent.
    pub(super) fn text(&mut self, name: &str) -> Result<String, Problem> {
        self.value(name, "must be text")
    }

    /// Takes a truth value; false where it is absent.
    pub(super) fn flag(&mut self, name: &str) -> Result<bool, Problem> {
        self.value(name, "must be true or false")
    }

    /// Takes an object; one without members where it is absent.
    pub(super) fn child(&mut self, name: &str) -> Result<Self, Problem> {
        let path = self.at(name);
        let member = self.take(name);
        Self::open(path, member.as_ref().map_or("{}", |member| member.get()))
    }

    /// Takes a list of objects; an empty one where it is absent.
    pub(super) fn children(&mut self, name: &str) -> Result<Vec<Self>, Problem> {
        let path = self.at(name);
        let list: Vec<Box<RawValue>> = self.value(name, "must be a list of objects")?;
        list.iter()
            .enumerate()
            .map(|(number, member)| Self::open(format!("{path}[{number}]"), member.get()))
            .collect()
    }

    /// Refuses what is left: the first by name.
    pub(super) fn end(self) -> Result<(), Problem> {
        match self.left.keys().next() {
            Some(name) => Err(self.problem(name, "not known here")),
            None => Ok(()),
        }
    }

    fn value<T: DeserializeOwned + Default>(&mut self, name: &str, problem: &str) -> Result<T, Problem> {
        self.take(name).map_or_else(
            || Ok(T::default()),
            |member| serde_json::from_str(member.get()).map_err(|_| self.problem(name, problem)),
        )
    }

    fn at(&self, name: &str) -> String {
        let dot = if self.path.is_empty() || name.is_empty() { "" } else { "." };
        format!("{}{dot}{name}", self.path)
    }
}

/// Whether an escape of a JSON text is a surrogate that stands by itself.
fn holds_half_of_a_pair(json: &str) -> bool {
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        let (unit, after) = escaped(&rest[at..]);
        rest = after;
        match unit {
            Some(0xD800..=0xDBFF) => match escaped(rest) {
                (Some(0xDC00..=0xDFFF), after) => rest = after,
                _ => return true,
            },
            Some(0xDC00..=0xDFFF) => return true,
            _ => {}
        }
    }
    false
}

/// The UTF-16 unit that a text begins with, if it begins with `\u`, and what follows the escape.
fn escaped(text: &str) -> (Option<u16>, &str) {
    match text.strip_prefix("\\u").and_then(|hex| hex.split_at_checked(4)) {
        Some((hex, after)) => (u16::from_str_radix(hex, 16).ok(), after),
        None => (None, text.get(2..).unwrap_or_default()),
    }
}

fn not_json(error: &serde_json::Error) -> Problem {
    // It counts lines too, and there is only one.
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or_default();
    Problem(format!("not JSON: {what}, at column {}", error.column()))
}
