//! One `StreamBatch` call.
//!
//! Three share it. A thread reads lines (`feed`). A task of its own sends them ([`Sender`](crate::sender)). The
//! session itself hears what the service says, writes results as they come, and ends the others when the stream ends.
//! What the sender has to know of what was heard is in a [`Heard`], of which it sees the latest.

use std::error::Error;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Code, Extensions, Request};
use unisono_client::Failure;
use unisono_client::v1::batch_event::Event;
use unisono_client::v1::batch_inference_client::BatchInferenceClient;
use unisono_client::v1::stream_batch_response::Message;
use unisono_client::v1::{BatchEvent, BatchState, Item, Progress, StreamBatchOpen, StreamBatchResponse};

use crate::output::{Line, Tally, tell};
use crate::sender::{Heard, Sender};

const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// Why a stream ended before its batch.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// A status with a reason of the service's: trying again changes nothing.
    #[error("the service refused: {0}")]
    Refused(Failure),
    #[error("the connection was lost: {0}")]
    Lost(String),
    #[error("results cannot be written: {0}")]
    Output(#[from] io::Error),
}

impl From<tonic::Status> for SessionError {
    fn from(status: tonic::Status) -> Self {
        let failure = Failure::from(&status);
        if failure.reason.is_empty() {
            Self::Lost(with_cause(&failure, &status))
        } else if failure.code == Code::Unavailable {
            Self::Lost(failure.to_string())
        } else {
            Self::Refused(failure)
        }
    }
}

/// A failure that is not the service's own, and what lies at its bottom, which says more.
fn with_cause(failure: &Failure, status: &tonic::Status) -> String {
    let causes = std::iter::successors(status.source(), |&cause| cause.source());
    match causes.last().map(ToString::to_string) {
        Some(cause) if !failure.message.contains(&cause) => format!("{failure}: {cause}"),
        _ => failure.to_string(),
    }
}

/// What is known of a batch, and where its results go.
pub(crate) struct Session<W> {
    out: W,
    /// `None` until it is known.
    pub(crate) batch_id: Option<String>,
    /// The last event that was taken whole: a batch that is resumed goes on after it.
    pub(crate) sequence: u64,
    /// Parts of the result that comes next.
    parts: String,
    /// How the batch ended, once that was heard.
    end: Option<BatchState>,
    tally: Tally,
    /// Lines of the file that are no items.
    unreadable: Arc<AtomicU64>,
    progress: Progress,
    heard: watch::Sender<Heard>,
}

impl<W: Write> Session<W> {
    /// `resume` is the batch to go on with, of which the events up to `sequence` are known.
    pub(crate) fn new(resume: Option<String>, sequence: u64, unreadable: Arc<AtomicU64>, out: W) -> Self {
        let mut session = Self {
            out,
            batch_id: None,
            sequence,
            parts: String::new(),
            end: None,
            tally: Tally::default(),
            unreadable,
            progress: Progress::default(),
            heard: watch::Sender::new(Heard::default()),
        };
        if let Some(batch_id) = resume {
            session.accept(batch_id);
        }
        session
    }

    /// Returns after the batch's end.
    pub(crate) async fn run(
        &mut self,
        mut client: BatchInferenceClient<Channel>,
        metadata: MetadataMap,
        open: StreamBatchOpen,
        items: mpsc::Receiver<Item>,
        interrupted: CancellationToken,
    ) -> Result<(), SessionError> {
        let (out, outgoing) = mpsc::channel(1);
        let sender = Sender::new(client.clone(), out, items, self.heard.subscribe(), interrupted);
        // What it holds ends with it.
        let mut tasks = JoinSet::new();
        tasks.spawn(sender.run(open));
        let request = Request::from_parts(metadata, Extensions::default(), ReceiverStream::new(outgoing));
        let mut stream = client.stream_batch(request).await?.into_inner();

        let mut ticks = tokio::time::interval_at(Instant::now() + PROGRESS_EVERY, PROGRESS_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                message = stream.message() => match message? {
                    Some(message) => self.hear(message)?,
                    None => break,
                },
                _ = ticks.tick() => self.tell_progress(),
            }
        }
        match self.end {
            Some(_) => Ok(()),
            None => Err(SessionError::Lost("the stream ended before the batch".to_owned())),
        }
    }

    fn hear(&mut self, message: StreamBatchResponse) -> io::Result<()> {
        match message.message {
            Some(Message::Credit(credit)) => {
                self.heard.send_modify(|heard| heard.credit = heard.credit.max(credit.total_items));
            }
            Some(Message::ItemsAcknowledged(acknowledged)) => {
                for line in acknowledged.items.into_iter().filter_map(Line::of_refusal) {
                    self.put(&line)?;
                    self.heard.send_modify(|heard| heard.refused += 1);
                }
            }
            Some(Message::Event(event)) => self.hear_event(event)?,
            None => {} // a newer service may say more
        }
        Ok(())
    }

    fn hear_event(&mut self, event: BatchEvent) -> io::Result<()> {
        match event.event {
            Some(Event::Accepted(accepted)) if self.batch_id.is_none() => self.accept(accepted.batch_id),
            Some(Event::ResultPart(part)) => {
                self.parts += &part.content;
                return Ok(()); // its sequence counts when the result is whole
            }
            Some(Event::Result(result)) => {
                let parts = std::mem::take(&mut self.parts);
                self.put(&Line::of_result(result, parts))?;
            }
            Some(Event::Progress(progress)) => self.progress = progress,
            Some(Event::Summary(summary)) => self.end = Some(summary.state()),
            _ => {}
        }
        self.sequence = event.sequence.unwrap_or(self.sequence);
        Ok(())
    }

    fn accept(&mut self, batch_id: String) {
        tell(format_args!("batch {batch_id}"));
        self.heard.send_modify(|heard| heard.batch_id = Some(batch_id.clone()));
        self.batch_id = Some(batch_id);
    }

    fn put(&mut self, line: &Line) -> io::Result<()> {
        line.write_to(&mut self.out)?;
        self.tally.add(line.state);
        Ok(())
    }

    fn tell_progress(&self) {
        let Progress { in_flight, queued, .. } = self.progress;
        tell(format_args!("progress: {}; {in_flight} running, {queued} waiting", self.tally()));
    }

    /// How the lines of the file fared so far.
    pub(crate) fn tally(&self) -> String {
        format!("{}, {} unreadable", self.tally, self.unreadable.load(Ordering::Relaxed))
    }

    /// How the batch ended before its time, where it did: somebody cancelled it, say.
    pub(crate) fn cut_short(&self) -> Option<&str> {
        let end = self.end.filter(|end| *end != BatchState::Completed)?.as_str_name();
        Some(end.strip_prefix("BATCH_STATE_").unwrap_or(end))
    }

    /// Whether the batch came to its own end, with an answer to every line.
    pub(crate) fn is_all_completed(&self) -> bool {
        self.end == Some(BatchState::Completed)
            && self.tally.is_all_completed()
            && self.unreadable.load(Ordering::Relaxed) == 0
    }
}
