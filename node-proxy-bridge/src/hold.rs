//! Holding connections until an oracle has judged their first bytes: reads what the programs send here, asks, says the
//! verdict to the kernel, and gives the bytes back.
//!
//! Invariant: bytes go back only after the kernel has the verdict that allows them, and only as the copy has them
//! (`custody`). Whatever goes wrong, they don't: the client sends them again, or is refused.

pub mod custody;
pub mod first;
pub mod frame;
pub mod oracle;

use std::collections::{BTreeMap, HashMap};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use thyra_datapath::{HeldConnection, Holding, TAP_HEADER, Tap, TapWatch};
use thyra_datapath_abi::HeldVerdict;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, interval};
use tracing::{debug, warn};

use self::custody::{Custody, Taken};
use self::frame::{ACK, FIN, Headers, Numbers, PSH, RST, SYN, Segment};
use self::oracle::{Oracle, Said};
use crate::listener::Reading;
use crate::records::{Decision, Record, Records, What};

/// So long a connection may take to say what is judged.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// So long the pod may take to acknowledge it.
const GUARD: Duration = Duration::from_secs(60);
/// How often is looked what is over.
const LOOK: Duration = Duration::from_millis(100);
/// What the client won't send again goes to the pod once more after so long.
const AGAIN: Duration = Duration::from_millis(300);
/// Connections that are held at a time; what comes then is dropped and comes again.
const MAX_HELD: usize = 4_096;
/// Those of one pod, and of one client's address.
const MAX_OF_POD: usize = 1_024;
const MAX_OF_CLIENT: usize = 256;
/// Frames between two looks at anything else.
const BURST: usize = 64;
/// The longest frame, with what is in front.
const FRAME: usize = TAP_HEADER + 14 + 65_536;

/// The oracles, by number of the residual.
pub type Oracles = BTreeMap<u16, Oracle>;

/// What became of connections, since the start.
#[derive(Debug, Default)]
pub struct Counts {
    /// Allowed.
    pub allowed: AtomicU64,
    /// Refused by Envoy.
    pub refused: AtomicU64,
    /// Refused: they said nothing that could be judged in time.
    pub late: AtomicU64,
    /// Refused: other bytes in the place of held ones.
    pub conflicts: AtomicU64,
    /// Segments dropped for want of room.
    pub full: AtomicU64,
    /// Held now.
    pub held: AtomicU64,
}

type Ends = (SocketAddr, SocketAddr);

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// Envoy says so; it is told already.
    Envoy,
    /// Other bytes in the place of held ones.
    Conflict,
    /// It took too long.
    Late,
    /// It was judged, and nobody has what was judged any more.
    Lost,
}

/// A connection in custody.
struct Flow {
    kernel: HeldConnection,
    custody: Custody,
    headers: Headers,
    /// Acknowledgment number of the client's last segment.
    acknowledgment: u32,
    /// Most bytes in a segment.
    largest: usize,
    since: Instant,
    /// The client was told that its bytes have arrived, and won't say them again.
    is_acknowledged: bool,
    given_back: Instant,
    /// Where the oracle gets its bytes from; none once it has answered.
    asking: Option<mpsc::UnboundedSender<Vec<u8>>>,
}

/// An oracle's answer, on the connection that began so.
struct Answer {
    ends: Ends,
    kernel: HeldConnection,
    reading: Reading,
    said: Said,
}

/// See the module.
pub struct Keeper {
    holding: Holding,
    tap: Arc<Tap>,
    oracles: watch::Receiver<Arc<Oracles>>,
    counts: Arc<Counts>,
    /// Of what Envoy doesn't tell.
    records: Records,
    flows: HashMap<Ends, Flow>,
    answers: (mpsc::UnboundedSender<Answer>, mpsc::UnboundedReceiver<Answer>),
}

impl Keeper {
    /// Nothing is held yet.
    #[must_use]
    pub fn new(holding: Holding, oracles: watch::Receiver<Arc<Oracles>>, records: Records) -> Self {
        Self {
            tap: Arc::clone(holding.tap()),
            holding,
            oracles,
            counts: Arc::default(),
            records,
            flows: HashMap::new(),
            answers: mpsc::unbounded_channel(),
        }
    }

    /// What becomes of connections.
    #[must_use]
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    /// Holds connections until it is dropped.
    ///
    /// # Errors
    /// The interface can't be waited for.
    pub async fn run(mut self) -> io::Result<()> {
        let frames = TapWatch::new(&self.tap)?;
        let mut look = interval(LOOK);
        let mut bytes = vec![0; FRAME];
        loop {
            tokio::select! {
                length = frames.read(&mut bytes) => {
                    self.arrived(&bytes[..length?]);
                    for _ in 1..BURST {
                        match self.tap.read(&mut bytes) {
                            Ok(length) => self.arrived(&bytes[..length]),
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                            Err(error) => return Err(error),
                        }
                    }
                }
                Some(answer) = self.answers.1.recv() => self.answered(answer),
                _ = look.tick() => self.look(),
            }
            let held = u64::try_from(self.flows.len()).unwrap_or(u64::MAX);
            self.counts.held.store(held, Ordering::Relaxed);
        }
    }

    fn arrived(&mut self, bytes: &[u8]) {
        let Some(segment) = frame::read(bytes) else {
            return;
        };
        if segment.flags & (SYN | RST | ACK) != ACK {
            return;
        }
        let ends = (segment.remote, segment.local);
        let kernel = match self.holding.find(segment.local, segment.remote) {
            Ok(Some(kernel)) if !kernel.is_open => kernel,
            Ok(_) => return,
            Err(error) => {
                warn!(%error, "held connections can't be looked up; what comes is dropped");
                return;
            }
        };
        let same = |flow: &Flow| flow.kernel.isns == kernel.isns && flow.kernel.residual == kernel.residual;
        if self.flows.get(&ends).is_some_and(|flow| !same(flow)) {
            self.flows.remove(&ends);
        }
        if !self.flows.contains_key(&ends) && !self.admit(ends, kernel, &segment) {
            return;
        }
        let Some(flow) = self.flows.get_mut(&ends) else {
            return;
        };
        flow.headers = segment.headers;
        flow.acknowledgment = segment.acknowledgment;
        flow.largest = flow.largest.max(segment.largest);
        let fin = segment.flags & FIN != 0;
        match flow.custody.take(segment.sequence, segment.payload, fin) {
            Taken::Nothing => {}
            Taken::Known => acknowledge(&self.tap, flow),
            Taken::More(range) => self.feed(ends, range),
            Taken::Again(range) => self.give_back(&ends, range),
            Taken::Beyond => {
                let numbers = Numbers {
                    sequence: segment.sequence,
                    acknowledgment: segment.acknowledgment,
                    flags: ACK | segment.flags & (FIN | PSH),
                };
                write_segments(&self.tap, flow, numbers, segment.payload);
            }
            Taken::Conflict => self.refuse(&ends, Refusal::Conflict),
        }
    }

    /// Begins to hold a connection, if there is room for it and an oracle.
    fn admit(&mut self, ends: Ends, kernel: HeldConnection, segment: &Segment<'_>) -> bool {
        let flow = Flow {
            custody: Custody::new(kernel.isns.client),
            headers: segment.headers.clone(),
            acknowledgment: segment.acknowledgment,
            largest: segment.largest,
            since: Instant::now(),
            is_acknowledged: false,
            given_back: Instant::now(),
            asking: None,
            kernel,
        };
        if kernel.verdict.is_some() {
            // Judged, and the copy that was is gone: nothing else may take its place.
            self.flows.insert(ends, flow);
            self.refuse(&ends, Refusal::Lost);
            return false;
        }
        if !self.oracles.borrow().contains_key(&kernel.residual) {
            return false;
        }
        let of = |own: &dyn Fn(&Flow) -> bool| self.flows.values().filter(|flow| own(flow)).count();
        let is_full = self.flows.len() >= MAX_HELD
            || of(&|flow| flow.kernel.endpoint == kernel.endpoint) >= MAX_OF_POD
            || of(&|flow| flow.kernel.remote.ip() == kernel.remote.ip()) >= MAX_OF_CLIENT;
        if is_full {
            self.counts.full.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        self.flows.insert(ends, flow);
        true
    }

    /// Gives the oracle what is new; the first bytes ask it.
    fn feed(&mut self, ends: Ends, range: Range<usize>) {
        let Some(flow) = self.flows.get_mut(&ends) else {
            return;
        };
        let bytes = flow.custody.bytes()[range].to_vec();
        if let Some(asking) = &flow.asking {
            // Who has answered already needs no more.
            let _answered = asking.send(bytes);
            return;
        }
        let Some(oracle) = self.oracles.borrow().get(&flow.kernel.residual).cloned() else {
            self.flows.remove(&ends);
            return;
        };
        let (asking, asked) = mpsc::unbounded_channel();
        let _own = asking.send(bytes);
        flow.asking = Some(asking);
        let (answers, kernel) = (self.answers.0.clone(), flow.kernel);
        tokio::spawn(async move {
            let said = oracle::ask(&oracle, ends, asked).await;
            let answer = Answer {
                ends,
                kernel,
                reading: oracle.reading,
                said,
            };
            // Nobody holds anything any more.
            let _ended = answers.send(answer);
        });
    }

    fn answered(&mut self, answer: Answer) {
        let Answer {
            ends,
            kernel,
            reading,
            said,
        } = answer;
        let is_it =
            |flow: &&mut Flow| flow.kernel.isns == kernel.isns && flow.kernel.residual == kernel.residual;
        let Some(flow) = self.flows.get_mut(&ends).filter(is_it) else {
            return;
        };
        // Of a stream Envoy tells by itself, with the rule.
        let told = match said {
            _ if reading == Reading::Stream => None,
            Said::Yes => Some(Decision::Allowed(None)),
            Said::No => Some(Decision::Refused),
            Said::Nothing => None,
        };
        if let Some(decision) = told {
            tell(&self.records, ends, flow.since.elapsed(), decision);
        }
        match said {
            Said::Yes => {
                flow.asking = None;
                flow.since = Instant::now();
                flow.given_back = flow.since;
                let end = flow.custody.allow();
                if let Err(error) = self.holding.judge(&kernel, HeldVerdict::ALLOW, end) {
                    warn!(%error, "a verdict can't be written; the connection is refused");
                    self.flows.remove(&ends);
                    return;
                }
                self.counts.allowed.fetch_add(1, Ordering::Relaxed);
                let all = 0..flow.custody.bytes().len();
                self.give_back(&ends, all);
            }
            Said::No => self.refuse(&ends, Refusal::Envoy),
            // What comes again asks again.
            Said::Nothing => drop(self.flows.remove(&ends)),
        }
    }

    /// These bytes of the copy go to the pod.
    fn give_back(&self, ends: &Ends, range: Range<usize>) {
        let Some(flow) = self.flows.get(ends) else {
            return;
        };
        let bytes = flow.custody.bytes();
        let fin = if flow.custody.is_ended() && range.end == bytes.len() {
            FIN
        } else {
            0
        };
        let numbers = Numbers {
            sequence: flow.custody.sequence(range.start),
            acknowledgment: flow.acknowledgment,
            flags: ACK | PSH | fin,
        };
        write_segments(&self.tap, flow, numbers, &bytes[range]);
    }

    /// The connection is over: both sides get a reset.
    fn refuse(&mut self, ends: &Ends, why: Refusal) {
        let Some(flow) = self.flows.remove(ends) else {
            return;
        };
        why.counter(&self.counts).fetch_add(1, Ordering::Relaxed);
        debug!(client = %ends.0, pod = %ends.1, why = why.text(), "a held connection is refused");
        if why != Refusal::Envoy {
            tell(
                &self.records,
                *ends,
                flow.since.elapsed(),
                Decision::Unjudged(why.text()),
            );
        }
        if let Err(error) = self.holding.judge(&flow.kernel, HeldVerdict::DENY, 0) {
            warn!(%error, "a verdict can't be written; the connection stays held");
        }
        let (first, held) = (flow.custody.sequence(0), flow.custody.bytes().len());
        let reset = |sequence, acknowledgment| Numbers {
            sequence,
            acknowledgment,
            flags: RST | ACK,
        };
        let to_pod = flow.headers.bare_to_pod(reset(first, flow.acknowledgment));
        let to_client = flow
            .headers
            .to_client(reset(flow.acknowledgment, flow.custody.sequence(held)));
        for segment in [to_pod, to_client] {
            written(self.tap.write(&[IoSlice::new(&segment)]));
        }
    }

    /// What took too long is refused; what is open is no longer in custody.
    fn look(&mut self) {
        let (mut late, mut over, mut again) = (Vec::new(), Vec::new(), Vec::new());
        for (ends, flow) in &mut self.flows {
            let limit = if flow.custody.is_allowed() {
                GUARD
            } else {
                PATIENCE
            };
            if flow.since.elapsed() >= limit {
                late.push(*ends);
            } else if flow.custody.is_allowed() {
                let (remote, local) = *ends;
                match self.holding.find(local, remote) {
                    Ok(Some(now)) if now.isns == flow.kernel.isns && !now.is_open => {
                        if flow.is_acknowledged && flow.given_back.elapsed() >= AGAIN {
                            flow.given_back = Instant::now();
                            again.push((*ends, 0..flow.custody.bytes().len()));
                        }
                    }
                    Ok(_) => over.push(*ends),
                    Err(error) => debug!(%error, "a held connection can't be looked up"),
                }
            }
        }
        for (ends, range) in again {
            self.give_back(&ends, range);
        }
        for ends in late {
            self.refuse(&ends, Refusal::Late);
        }
        for ends in over {
            if let Some(flow) = self.flows.remove(&ends) {
                self.holding.forget(&flow.kernel);
            }
        }
    }
}

impl Refusal {
    fn counter(self, counts: &Counts) -> &AtomicU64 {
        match self {
            Self::Envoy => &counts.refused,
            Self::Conflict => &counts.conflicts,
            Self::Late | Self::Lost => &counts.late,
        }
    }

    const fn text(self) -> &'static str {
        match self {
            Self::Envoy => "refused by envoy",
            Self::Conflict => "other bytes in the place of held ones",
            Self::Late => "it took too long",
            Self::Lost => "judged before, and what was judged is gone",
        }
    }
}

/// What Envoy doesn't.
fn tell(records: &Records, (client, pod): Ends, took: Duration, decision: Decision) {
    let record = Record {
        client,
        pod,
        what: What::Held { server_name: None },
        took,
        decision,
    };
    records.tell([Some(record)].into_iter());
}

/// A client that sends the same again has lost what follows, and doesn't send that before the first is acknowledged.
fn acknowledge(tap: &Tap, flow: &mut Flow) {
    flow.is_acknowledged = true;
    let numbers = Numbers {
        sequence: flow.acknowledgment,
        acknowledgment: flow.custody.sequence(flow.custody.bytes().len()),
        flags: ACK,
    };
    written(tap.write(&[IoSlice::new(&flow.headers.to_client(numbers))]));
}

/// In segments of the size that the client's had.
fn write_segments(tap: &Tap, flow: &Flow, numbers: Numbers, payload: &[u8]) {
    let mut sequence = numbers.sequence;
    let count = payload.len().div_ceil(flow.largest).max(1);
    for index in 0..count {
        let from = index * flow.largest;
        let piece = &payload[from..payload.len().min(from + flow.largest)];
        let flags = if index + 1 == count {
            numbers.flags
        } else {
            numbers.flags & !(FIN | PSH)
        };
        let headers = flow.headers.to_pod(
            Numbers {
                sequence,
                flags,
                ..numbers
            },
            piece,
        );
        written(tap.write(&[IoSlice::new(&headers), IoSlice::new(piece)]));
        sequence = sequence.wrapping_add(u32::try_from(piece.len()).unwrap_or(0));
    }
}

/// What is lost on the way comes again.
fn written(result: io::Result<()>) {
    if let Err(error) = result {
        debug!(%error, "a held segment can't be given back");
    }
}
