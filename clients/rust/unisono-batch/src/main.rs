//! Runs a file of requests as one batch, and writes each result as a line of JSON when it is there.
//!
//! ```text
//! unisono-batch [--target HOST:PORT] [--model NAME] [--resume BATCH_ID [--after SEQUENCE]] FILE|-
//! ```

mod arguments;
mod batchfile;
mod output;
mod sender;
mod session;
mod trace;

use std::error::Error;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use clap::Parser;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use unisono_client::tonic::transport::Endpoint;
use unisono_client::v1::batch_inference_client::BatchInferenceClient;
use unisono_client::v1::stream_batch_open::Batch;
use unisono_client::v1::{BatchConfig, Item, OnDisconnect, ReopenBatch, StreamBatchOpen, ValidationMode};

use crate::arguments::Arguments;
use crate::batchfile::BatchReader;
use crate::output::{complain, tell};
use crate::session::{Session, SessionError};
use crate::trace::BatchTrace;

const ALL_COMPLETED: u8 = 0;
/// Or were refused, or could not be read.
const SOME_FAILED: u8 = 1;
const WRONG_USAGE: u8 = 2;
/// No service, or none any more.
const LOST: u8 = 3;
const INTERRUPTED: u8 = 130;

/// Items that were read ahead.
const READ_AHEAD: usize = 100;

fn main() -> ExitCode {
    let arguments = Arguments::parse(); // it ends the program by itself where they are wrong
    match run(&arguments) {
        Ok(code) => code.into(),
        Err(error) => {
            complain(error);
            WRONG_USAGE.into()
        }
    }
}

/// Does it all, and returns the exit code; fails before anything is asked of the service.
fn run(arguments: &Arguments) -> Result<u8, Box<dyn Error>> {
    let source = open(&arguments.file).map_err(|error| format!("{}: {error}", arguments.file))?;
    let endpoint = unisono_client::endpoint(&arguments.target())?;
    let trace = BatchTrace::start()?;
    let runtime = Runtime::new()?;
    let code = runtime.block_on(run_batch(arguments, source, endpoint, trace));
    // What is still under way (a name that is looked up) holds up nothing.
    runtime.shutdown_background();
    Ok(code)
}

fn open(file: &str) -> io::Result<Box<dyn Read + Send>> {
    Ok(match file {
        "-" => Box::new(io::stdin()),
        path => Box::new(File::open(path)?),
    })
}

async fn run_batch(
    arguments: &Arguments,
    source: Box<dyn Read + Send>,
    endpoint: Endpoint,
    trace: BatchTrace,
) -> u8 {
    tell(format_args!("trace {}", trace.id()));
    let interrupted = CancellationToken::new();
    tokio::spawn(listen_for_interrupts(interrupted.clone()));
    let unreadable = Arc::new(AtomicU64::new(0));
    let (items, has_items) = feed(arguments.file.clone(), source, Arc::clone(&unreadable));
    if arguments.resume.is_none() {
        let found = tokio::select! {
            found = has_items => found.map_err(|_| (WRONG_USAGE, format!("{} holds no items", arguments.file))),
            () = interrupted.cancelled() => Err((INTERRUPTED, "nothing was run".to_owned())),
        };
        if let Err((code, why)) = found {
            complain(&why);
            trace.end("", Some(why)).await;
            return code;
        }
    }

    let client = BatchInferenceClient::new(endpoint.connect_lazy());
    let out = io::stdout().lock();
    let mut session = Session::new(arguments.resume.clone(), arguments.after, unreadable, out);
    let outcome = session.run(client, trace.metadata(), opening(arguments), items, interrupted.clone()).await;

    let is_interrupted = interrupted.is_cancelled();
    let code = conclude(arguments, &session, outcome.as_ref().err(), is_interrupted);
    let batch_id = session.batch_id.unwrap_or_default();
    trace.end(&batch_id, outcome.err().map(|error| error.to_string())).await;
    code
}

/// Makes the first Ctrl-C cancel the batch, and the second end the program at once.
async fn listen_for_interrupts(interrupted: CancellationToken) {
    loop {
        if let Err(error) = tokio::signal::ctrl_c().await {
            complain(format_args!("Ctrl-C will not be heard: {error}"));
            return;
        }
        if interrupted.is_cancelled() {
            process::exit(INTERRUPTED.into());
        }
        tell("cancelling the batch; once more ends at once");
        interrupted.cancel();
    }
}

/// Reads items to the end of the file; what cannot be read is told and counted.
///
/// In a thread of its own, which may wait for standard input for ever and keeps the program from nothing. The second
/// one is told of the first item; where there is none, it fails.
fn feed(
    file: String,
    source: Box<dyn Read + Send>,
    unreadable: Arc<AtomicU64>,
) -> (mpsc::Receiver<Item>, oneshot::Receiver<()>) {
    let (items, received) = mpsc::channel(READ_AHEAD);
    let (first, has_items) = oneshot::channel();
    thread::spawn(move || {
        let mut first = Some(first);
        for item in BatchReader::new(BufReader::new(source)) {
            match item {
                Ok(item) => {
                    if let Some(first) = first.take() {
                        let _ = first.send(()); // where nobody listens, the batch was opened before
                    }
                    if items.blocking_send(item).is_err() {
                        return; // the stream has ended
                    }
                }
                Err(error) => {
                    unreadable.fetch_add(1, Ordering::Relaxed);
                    tell(format_args!("{file}: {error}"));
                }
            }
        }
    });
    (received, has_items)
}

fn opening(arguments: &Arguments) -> StreamBatchOpen {
    let batch = match &arguments.resume {
        Some(batch_id) => Batch::Reopen(ReopenBatch {
            batch_id: batch_id.clone(),
            after_sequence: arguments.after,
            ..ReopenBatch::default()
        }),
        None => Batch::Config(BatchConfig {
            model: arguments.model.clone(),
            // A malformed item costs itself, and not those that happen to be in the same message.
            validation: ValidationMode::PerItem.into(),
            // So that there is something to resume.
            on_disconnect: OnDisconnect::Detach.into(),
            ..BatchConfig::default()
        }),
    };
    StreamBatchOpen { batch: Some(batch), ..StreamBatchOpen::default() }
}

/// Says how it went, and gives the exit code.
fn conclude(
    arguments: &Arguments,
    session: &Session<impl Write>,
    error: Option<&SessionError>,
    is_interrupted: bool,
) -> u8 {
    let mut code = if session.is_all_completed() { ALL_COMPLETED } else { SOME_FAILED };
    match (error, &session.batch_id) {
        (None, _) => {
            // There may be lines that it never took.
            if let Some(how) = session.cut_short().filter(|_| !is_interrupted) {
                complain(format_args!("the batch ended before its time: {how}"));
            }
        }
        (Some(error @ SessionError::Refused(_)), _) => {
            complain(error);
            code = SOME_FAILED;
        }
        (Some(SessionError::Lost(why)), None) => {
            complain(format_args!("no service at {}: {why}", arguments.target()));
            return LOST;
        }
        (Some(error), batch_id) => {
            complain(error);
            if let Some(batch_id) = batch_id {
                let command = arguments.resume_command(batch_id, session.sequence);
                tell(format_args!("To go on where it ended:\n  {command}"));
            }
            code = LOST;
        }
    }
    tell(session.tally());
    if is_interrupted { INTERRUPTED } else { code }
}
