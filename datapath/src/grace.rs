//! The grace period: after a switch, no bank may be rewritten that a running program could still read.
//!
//! Invariant: `wait` returns only after every program that ran at the last `start` has ended. The wait runs
//! beside the caller from the moment of the switch on, so that the next change seldom pays for it.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::sys::MapOfMaps;

#[derive(Debug)]
pub(crate) struct Grace {
    map: Arc<MapOfMaps>,
    running: Option<JoinHandle<io::Result<()>>>,
    /// Nobody has waited since the last start, or waiting has failed.
    owed: bool,
}

impl Grace {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            map: Arc::new(MapOfMaps::create()?),
            running: None,
            owed: false,
        })
    }

    /// Starts to wait for the programs that run now.
    pub(crate) fn start(&mut self) {
        self.owed = true;
        let map = Arc::clone(&self.map);
        // A thread that can't be started leaves the debt to `wait`.
        self.running = std::thread::Builder::new()
            .name("grace".to_owned())
            .spawn(move || map.write())
            .ok();
    }

    /// Waits for the end of what `start` began; says how long this call took.
    pub(crate) fn wait(&mut self) -> io::Result<Duration> {
        let begun = Instant::now();
        if let Some(running) = self.running.take() {
            self.owed = !matches!(running.join(), Ok(Ok(())));
        }
        if self.owed {
            self.map.write()?;
            self.owed = false;
        }
        Ok(begun.elapsed())
    }
}
