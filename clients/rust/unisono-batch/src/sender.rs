//! What goes out on a stream: items as far as the credit goes, then the half-close; a cancel when it is asked for.

use std::time::Duration;

use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Request;
use tonic::transport::Channel;
use unisono_client::Failure;
use unisono_client::v1::batch_inference_client::BatchInferenceClient;
use unisono_client::v1::stream_batch_request::Message;
use unisono_client::v1::{
    AddItems, CancelBatchRequest, CancelItems, GetServerInfoRequest, Item, StreamBatchOpen,
    StreamBatchRequest,
};

use crate::output::complain;

// Of one message. A single item may be larger.
const MAX_ITEMS: u64 = 100;
const MAX_BYTES: usize = 1 << 20;
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// What the sender has to know of what came in.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) batch_id: Option<String>,
    /// Items that may be sent in all, refused ones not counted.
    pub(crate) credit: u64,
    pub(crate) refused: u64,
}

/// The stream has ended, and whoever reads it hears why.
struct StreamEnded;

impl<T> From<mpsc::error::SendError<T>> for StreamEnded {
    fn from(_: mpsc::error::SendError<T>) -> Self {
        Self
    }
}

impl From<watch::error::RecvError> for StreamEnded {
    fn from(_: watch::error::RecvError) -> Self {
        Self
    }
}

/// The one that sends. Dropping it half-closes the stream.
pub(crate) struct Sender {
    client: BatchInferenceClient<Channel>,
    out: mpsc::Sender<StreamBatchRequest>,
    items: mpsc::Receiver<Item>,
    heard: watch::Receiver<Heard>,
    /// Asks for the batch to be cancelled.
    interrupted: CancellationToken,
    /// Items that were sent, refused ones too.
    sent: u64,
    /// The most items that a batch may have, once that was asked and answered.
    max_items: Option<u64>,
}

impl Sender {
    pub(crate) fn new(
        client: BatchInferenceClient<Channel>,
        out: mpsc::Sender<StreamBatchRequest>,
        items: mpsc::Receiver<Item>,
        heard: watch::Receiver<Heard>,
        interrupted: CancellationToken,
    ) -> Self {
        Self { client, out, items, heard, interrupted, sent: 0, max_items: None }
    }

    /// Returns when nothing more can be said.
    pub(crate) async fn run(mut self, open: StreamBatchOpen) {
        let interrupted = self.interrupted.clone();
        if self.send(Message::Open(open)).await.is_err() {
            return;
        }
        tokio::select! {
            ended = self.send_items() => if ended.is_err() {
                return;
            },
            () = interrupted.cancelled() => {
                // Where it cannot be sent, the stream has ended.
                let _ = self.send(Message::CancelItems(CancelItems::default())).await;
                return;
            }
        }
        let Self { client, heard, out, .. } = self;
        drop(out); // which half-closes, and so releases what was added
        interrupted.cancelled().await;
        cancel(client, heard).await;
    }

    /// Returns after the last item.
    async fn send_items(&mut self) -> Result<(), StreamEnded> {
        while let Some(first) = self.items.recv().await {
            let room = self.wait_for_credit().await?;
            let items = self.at_hand(first, room.min(MAX_ITEMS));
            self.sent += items.len() as u64;
            self.send(Message::AddItems(AddItems { items })).await?;
        }
        Ok(())
    }

    /// Gathers what can be had without waiting.
    fn at_hand(&mut self, first: Item, most: u64) -> Vec<Item> {
        let mut bytes = first.encoded_len();
        let mut items = vec![first];
        while (items.len() as u64) < most && bytes < MAX_BYTES {
            let Ok(item) = self.items.try_recv() else { break };
            bytes += item.encoded_len();
            items.push(item);
        }
        items
    }

    /// Returns how many more items may be sent, which is one at least.
    ///
    /// Items that wait for nothing but a release cannot use up the credit for good: without another word they are
    /// released when they have waited for 50 ms, and items that end bring new credit. Only a batch that is as large as
    /// a batch may be gets no more; the service refuses the rest, each item with its reason.
    async fn wait_for_credit(&mut self) -> Result<u64, StreamEnded> {
        loop {
            let (credit, allowed) = {
                let heard = self.heard.borrow_and_update();
                (heard.credit, heard.credit.saturating_add(heard.refused))
            };
            if allowed > self.sent {
                return Ok(allowed - self.sent);
            }
            if self.sent > 0 && self.max_items().await.is_some_and(|most| credit >= most) {
                return Ok(MAX_ITEMS);
            }
            self.heard.changed().await?;
        }
    }

    /// The most items that a batch may have; asked for once it matters. `None` where there was no answer.
    async fn max_items(&mut self) -> Option<u64> {
        if self.max_items.is_none() {
            let mut request = Request::new(GetServerInfoRequest {});
            request.set_timeout(CALL_TIMEOUT);
            match self.client.get_server_info(request).await {
                Ok(info) => {
                    let limits = info.into_inner().limits.unwrap_or_default();
                    self.max_items = Some(limits.max_items.into()).filter(|most| *most > 0);
                }
                Err(status) => complain(format_args!("asking for limits: {}", Failure::from(&status))),
            }
        }
        self.max_items
    }

    async fn send(&self, message: Message) -> Result<(), StreamEnded> {
        Ok(self.out.send(StreamBatchRequest { message: Some(message) }).await?)
    }
}

/// Nothing more can be said on the stream, so that the batch is cancelled by its name.
async fn cancel(mut client: BatchInferenceClient<Channel>, mut heard: watch::Receiver<Heard>) {
    let batch_id = match heard.wait_for(|heard| heard.batch_id.is_some()).await {
        Ok(heard) => heard.batch_id.clone().unwrap_or_default(),
        Err(_) => return, // the stream has ended
    };
    let mut request = Request::new(CancelBatchRequest { batch_id, item_ids: Vec::new() });
    request.set_timeout(CALL_TIMEOUT);
    if let Err(status) = client.cancel_batch(request).await {
        complain(format_args!("cancelling: {}", Failure::from(&status)));
    }
}
