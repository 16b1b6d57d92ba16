//! What is written: results on standard output, all else on standard error.

use std::fmt;
use std::io::{self, Write};

use serde::Serialize;
use unisono_client::Failure;
use unisono_client::v1::result::Outcome;
use unisono_client::v1::{ItemAcknowledged, ItemState, Result as ItemResult};

/// How an item ended, or that it was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum State {
    Completed,
    Failed,
    Cancelled,
    Expired,
    Refused,
    /// A newer service may know more.
    Unknown,
}

impl From<ItemState> for State {
    fn from(state: ItemState) -> Self {
        match state {
            ItemState::Completed => Self::Completed,
            ItemState::Failed => Self::Failed,
            ItemState::Cancelled => Self::Cancelled,
            ItemState::Expired => Self::Expired,
            ItemState::Unspecified => Self::Unknown,
        }
    }
}

/// A result as it is written.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Line {
    id: String,
    /// The item's own id, for one of several answers.
    #[serde(skip_serializing_if = "String::is_empty")]
    variant_of: String,
    pub(crate) state: State,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Problem>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Problem {
    reason: String,
    code: i32,
    message: String,
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        Self { reason: failure.reason, code: failure.code.into(), message: failure.message }
    }
}

impl Line {
    /// A whole result; `parts` is the text that came before it in messages of its own.
    pub(crate) fn of_result(result: ItemResult, parts: String) -> Self {
        let state = result.state().into();
        let (content, error) = match result.outcome {
            Some(Outcome::Completion(completion)) => (Some(parts + &completion.content), None),
            Some(Outcome::Error(status)) => (None, Some(Failure::from(&status).into())),
            None => (None, None),
        };
        Self { id: result.item_id, variant_of: result.variant_of, state, content, error }
    }

    /// An item that was not taken; `None` where it was.
    pub(crate) fn of_refusal(item: ItemAcknowledged) -> Option<Self> {
        let failure = Failure::from(&item.refusal?);
        Some(Self {
            id: item.item_id,
            variant_of: String::new(),
            state: State::Refused,
            content: None,
            error: Some(failure.into()),
        })
    }

    /// Writes it whole, so that who reads has each result at once.
    pub(crate) fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        out.write_all(&line)?;
        out.flush()
    }
}

/// How many lines were written, by state.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    completed: u64,
    failed: u64,
    cancelled: u64,
    expired: u64,
    refused: u64,
    unknown: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, state: State) {
        *match state {
            State::Completed => &mut self.completed,
            State::Failed => &mut self.failed,
            State::Cancelled => &mut self.cancelled,
            State::Expired => &mut self.expired,
            State::Refused => &mut self.refused,
            State::Unknown => &mut self.unknown,
        } += 1;
    }

    pub(crate) fn is_all_completed(&self) -> bool {
        self.failed + self.cancelled + self.expired + self.refused + self.unknown == 0
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { completed, failed, cancelled, expired, refused, unknown } = self;
        write!(
            f,
            "{completed} completed, {failed} failed, {cancelled} cancelled, {expired} expired, {refused} refused"
        )?;
        if *unknown > 0 {
            write!(f, ", {unknown} in an unknown state")?;
        }
        Ok(())
    }
}

/// Says something that is no result.
pub(crate) fn tell(what: impl fmt::Display) {
    // Whom else could it be told that standard error is closed?
    let _ = writeln!(io::stderr(), "{what}");
}

/// Says something that went wrong.
pub(crate) fn complain(what: impl fmt::Display) {
    tell(format_args!("unisono-batch: {what}"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_client::tonic_types::Status;
    use unisono_client::v1::Completion;

    fn written(line: &Line) -> String {
        let mut out = Vec::new();
        line.write_to(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_answer_is_one_line() {
        let completion = Completion { content: "c\n".into(), ..Default::default() };
        let result = ItemResult {
            item_id: "a#2".into(),
            variant_of: "a".into(),
            state: ItemState::Completed.into(),
            outcome: Some(Outcome::Completion(completion)),
            ..Default::default()
        };
        assert_eq!(
            written(&Line::of_result(result, "ab".into())),
            "{\"id\":\"a#2\",\"variant_of\":\"a\",\"state\":\"COMPLETED\",\"content\":\"abc\\n\"}\n"
        );
    }

    #[test]
    fn only_what_was_not_taken_is_a_refusal() {
        let taken = ItemAcknowledged { item_id: "a".into(), index: Some(0), refusal: None };
        assert_eq!(Line::of_refusal(taken), None);
        let status = Status { code: 8, message: "no more".into(), details: Vec::new() };
        let refused = ItemAcknowledged { item_id: "b".into(), index: None, refusal: Some(status) };
        assert_eq!(
            Line::of_refusal(refused).as_ref().map(written).as_deref(),
            Some(
                "{\"id\":\"b\",\"state\":\"REFUSED\",\"error\":{\"reason\":\"\",\"code\":8,\"message\":\"no more\"}}\n"
            )
        );
    }

    #[test]
    fn all_else_than_completed_counts() {
        let mut tally = Tally::default();
        tally.add(State::Completed);
        assert!(tally.is_all_completed());
        for state in [State::Failed, State::Cancelled, State::Expired, State::Refused, State::Unknown] {
            let mut other = tally.clone();
            other.add(state);
            assert!(!other.is_all_completed(), "{state:?}");
        }
        assert_eq!(tally.to_string(), "1 completed, 0 failed, 0 cancelled, 0 expired, 0 refused");
    }
}
