//! The programs as the kernel runs them on single packets (`BPF_PROG_TEST_RUN`), with maps filled as the
//! host's.

use std::collections::BTreeMap;
use std::process::Command;

use aya::maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray, PerCpuValues, RingBuf, lpm_trie::Key};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use thyra_datapath_abi::maps::{EndpointCounter, ReasonCounter, VerdictCounter};
use thyra_datapath_abi::{Control, EndpointRecord, Event, Flow4, Flow6, FlowState, Reason, limits, maps};
use thyra_datapath_engine::flows::FlowTable;
use thyra_datapath_engine::host::{HostNode, Ledger};
use thyra_datapath_engine::{BankImage, Table, Tables as _};
use zerocopy::{FromBytes, IntoBytes};

use crate::case::{Case, Key as FlowKey, Program, Remembered, key, line4, line6};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/thyra.bpf.o"));

/// Interfaces that a packet can be at; test-run looks them up in the thread's network namespace.
const LINKS: [(u32, u32); 3] = [(2, 3), (4, 5), (6, 7)];

/// Offsets in `struct __sk_buff` (include/uapi/linux/bpf.h) and its length.
const CONTEXT: usize = 192;
const MARK: usize = 8;
const INGRESS: usize = 36;
const IFINDEX: usize = 40;

/// Loaded programs with their own maps.
pub(crate) struct Kernel {
    ebpf: Ebpf,
}

/// What the kernel did with a packet.
pub(crate) struct Run {
    /// What the program returned.
    pub(crate) code: i32,
    /// The packet afterwards.
    pub(crate) bytes: Vec<u8>,
}

/// Moves this thread into a network namespace of its own, with the interfaces of the world.
pub(crate) fn enter_namespace() {
    // SAFETY: no pointers; the thread alone moves.
    let moved = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(0, moved, "unshare: {}", std::io::Error::last_os_error());
    for (a, b) in LINKS {
        let (name_a, name_b) = (format!("t{a}"), format!("t{b}"));
        let (a, b) = (a.to_string(), b.to_string());
        let words = [
            "link", "add", &name_a, "index", &a, "type", "veth", "peer", "name", &name_b, "index", &b,
        ];
        let status = Command::new("ip").args(words).status().expect("`ip` runs");
        assert!(status.success(), "ip {}", words.join(" "));
    }
}

impl Kernel {
    /// Loads the object that ships with this build, with room for `outbound` connections of each family.
    pub(crate) fn load(outbound: Option<usize>) -> Self {
        let mut loader = EbpfLoader::new();
        if let Some(limit) = outbound {
            for map in [maps::OUTBOUND4, maps::OUTBOUND6] {
                loader.map_max_entries(map, u32::try_from(limit).unwrap());
            }
        }
        let mut ebpf = loader.load(OBJECT).unwrap();
        for name in [maps::TO_POD, maps::FROM_POD] {
            let program: &mut SchedClassifier = ebpf.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap_or_else(|e| panic!("{name}: {e:?}"));
        }
        Self { ebpf }
    }

    fn array<V: aya::Pod>(&mut self, name: &str) -> Array<&mut MapData, V> {
        Array::try_from(self.ebpf.map_mut(name).unwrap()).unwrap()
    }

    fn hash<K: aya::Pod>(&mut self, name: &str) -> HashMap<&mut MapData, K, [u8; size_of::<FlowState>()]> {
        HashMap::try_from(self.ebpf.map_mut(name).unwrap()).unwrap()
    }

    /// Writes `image` into one bank and makes it live, with the flags of `control`.
    pub(crate) fn fill(&mut self, image: &BankImage, bank: u32, control: Control) {
        for table in Table::BANKED {
            let words = image.words(table);
            match table {
                Table::Sources4 => self.put::<{ limits::SLOTS4 }>(table, bank, words),
                Table::Sources6 => self.put::<{ limits::SLOTS6 * 3 }>(table, bank, words),
                _ => self.put::<1>(table, bank, words),
            }
        }
        let mut blocks: LpmTrie<_, [u8; 8], u32> =
            LpmTrie::try_from(self.ebpf.map_mut(maps::BLOCKS4).unwrap()).unwrap();
        for (key, class) in image.blocks4(bank) {
            let data = <[u8; 8]>::read_from_bytes(&key.as_bytes()[4..]).unwrap();
            blocks.insert(&Key::new(key.prefix_len, data), class, 0).unwrap();
        }
        let mut blocks: LpmTrie<_, [u8; 20], u32> =
            LpmTrie::try_from(self.ebpf.map_mut(maps::BLOCKS6).unwrap()).unwrap();
        for (key, class) in image.blocks6(bank) {
            let data = <[u8; 20]>::read_from_bytes(&key.as_bytes()[4..]).unwrap();
            blocks.insert(&Key::new(key.prefix_len, data), class, 0).unwrap();
        }
        self.control(Control::new(control.generation(), bank, control.0));
    }

    /// Stores the control word.
    pub(crate) fn control(&mut self, control: Control) {
        self.array::<u64>(maps::CONTROL).set(0, control.0, 0).unwrap();
    }

    /// Writes the words of a table whose elements are `N` words long; those that are zero are zero already.
    fn put<const N: usize>(&mut self, table: Table, bank: u32, words: &[u64]) {
        let base = usize::try_from(bank).unwrap() * table.words() / N;
        let mut map = self.array::<[u64; N]>(table.name());
        for (i, element) in words.chunks(N).enumerate() {
            if element.iter().any(|word| *word != 0) {
                let mut whole = [0; N];
                whole[..element.len()].copy_from_slice(element);
                map.set(u32::try_from(base + i).unwrap(), whole, 0).unwrap();
            }
        }
    }

    /// Writes the records of a node's endpoints.
    pub(crate) fn attach(&mut self, node: &HostNode) {
        for endpoint in 1..8 {
            let record = (&node).record(endpoint).unwrap();
            let bytes = <[u8; size_of::<EndpointRecord>()]>::read_from_bytes(record.as_bytes()).unwrap();
            self.array::<[u8; size_of::<EndpointRecord>()]>(maps::ENDPOINTS)
                .set(u32::from(endpoint), bytes, 0)
                .unwrap();
        }
        for word in 0..4 {
            let value = (&node).word(Table::Ifindex, word);
            self.array::<u64>(maps::IFINDEX).set(word, value, 0).unwrap();
        }
    }

    /// Replaces what is remembered of connections.
    pub(crate) fn remember(&mut self, lines: &[String]) {
        for name in [maps::OUTBOUND4, maps::HOST_FLOWS4] {
            let mut map = self.hash::<[u8; size_of::<Flow4>()]>(name);
            let keys: Vec<_> = map.keys().map(Result::unwrap).collect();
            keys.iter().for_each(|key| map.remove(key).unwrap());
        }
        for name in [maps::OUTBOUND6, maps::HOST_FLOWS6] {
            let mut map = self.hash::<[u8; size_of::<Flow6>()]>(name);
            let keys: Vec<_> = map.keys().map(Result::unwrap).collect();
            keys.iter().for_each(|key| map.remove(key).unwrap());
        }
        for line in lines {
            let flow = Remembered::parse(line);
            let state = FlowState {
                flags: flow.flags,
                ..FlowState::default()
            };
            let state = <[u8; 16]>::read_from_bytes(state.as_bytes()).unwrap();
            match (key(&flow), flow.table) {
                (FlowKey::V4(key), table) => {
                    let name = if table == FlowTable::Outbound {
                        maps::OUTBOUND4
                    } else {
                        maps::HOST_FLOWS4
                    };
                    let key = <[u8; 16]>::read_from_bytes(key.as_bytes()).unwrap();
                    self.hash::<[u8; 16]>(name).insert(key, state, 0).unwrap();
                }
                (FlowKey::V6(key), table) => {
                    let name = if table == FlowTable::Outbound {
                        maps::OUTBOUND6
                    } else {
                        maps::HOST_FLOWS6
                    };
                    let key = <[u8; 40]>::read_from_bytes(key.as_bytes()).unwrap();
                    self.hash::<[u8; 40]>(name).insert(key, state, 0).unwrap();
                }
            }
        }
    }

    /// What is remembered of connections, as cases write it.
    pub(crate) fn flows(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        for (table, name) in [
            (FlowTable::Outbound, maps::OUTBOUND4),
            (FlowTable::Host, maps::HOST_FLOWS4),
        ] {
            for entry in self.hash::<[u8; 16]>(name).iter() {
                let (key, state) = entry.unwrap();
                let key = Flow4::read_from_bytes(&key).unwrap();
                lines.push(line4(table, &key, &FlowState::read_from_bytes(&state).unwrap()));
            }
        }
        for (table, name) in [
            (FlowTable::Outbound, maps::OUTBOUND6),
            (FlowTable::Host, maps::HOST_FLOWS6),
        ] {
            for entry in self.hash::<[u8; 40]>(name).iter() {
                let (key, state) = entry.unwrap();
                let key = Flow6::read_from_bytes(&key).unwrap();
                lines.push(line6(table, &key, &FlowState::read_from_bytes(&state).unwrap()));
            }
        }
        lines.sort();
        lines
    }

    /// Runs a packet in the place of a case's own.
    pub(crate) fn run(&mut self, case: &Case, frame: &[u8], mark: u32) -> Run {
        let name = match case.program {
            Program::ToPod => maps::TO_POD,
            Program::FromPod => maps::FROM_POD,
        };
        let mut context = [0; CONTEXT];
        context[MARK..MARK + 4].copy_from_slice(&mark.to_ne_bytes());
        context[INGRESS..INGRESS + 4].copy_from_slice(&case.ingress().to_ne_bytes());
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&case.at.to_ne_bytes());
        let mut out = vec![0; 4096];
        let program: &SchedClassifier = self.ebpf.program(name).unwrap().try_into().unwrap();
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let result = program
            .test_run(options)
            .unwrap_or_else(|e| panic!("{}: {e:?}", case.name));
        out.truncate(usize::try_from(result.data_size_out).unwrap());
        let code = i32::from_ne_bytes(result.return_value.to_ne_bytes());
        Run { code, bytes: out }
    }

    /// Takes everything that was counted and reported since the last call.
    pub(crate) fn take_ledger(&mut self) -> Ledger {
        let verdicts = self.take::<24>(maps::VERDICT_COUNTERS, 0..16);
        let reasons = self.take::<16>(maps::REASON_COUNTERS, 0..256);
        let endpoints = self.take::<32>(maps::ENDPOINT_COUNTERS, 0..16);
        let lost = self.take::<8>(maps::LOST, 0..1);
        assert_eq!(0, lost.len(), "events were lost");
        let mut ring = RingBuf::try_from(self.ebpf.map_mut(maps::EVENTS).unwrap()).unwrap();
        let mut events = Vec::new();
        while let Some(item) = ring.next() {
            events.push(Event::read_from_bytes(&item).unwrap());
        }
        let number = |index: u32| u16::try_from(index).unwrap();
        let reason = |index: u32| Reason::from_number(u8::try_from(index).unwrap()).expect("a known reason");
        Ledger {
            verdicts: verdicts
                .into_iter()
                .map(|(i, sum)| (number(i), counter::<VerdictCounter>(&sum)))
                .collect(),
            reasons: reasons
                .into_iter()
                .map(|(i, sum)| (reason(i), counter::<ReasonCounter>(&sum)))
                .collect(),
            endpoints: endpoints
                .into_iter()
                .map(|(i, sum)| (number(i), counter::<EndpointCounter>(&sum)))
                .collect(),
            events,
        }
    }

    /// The counters that are not zero, summed over the CPUs; they are zero afterwards.
    fn take<const BYTES: usize>(
        &mut self,
        name: &str,
        indices: std::ops::Range<u32>,
    ) -> BTreeMap<u32, Vec<u64>> {
        let mut map: PerCpuArray<_, [u8; BYTES]> =
            PerCpuArray::try_from(self.ebpf.map_mut(name).unwrap()).unwrap();
        let mut sums = BTreeMap::new();
        for index in indices {
            let values = map.get(&index, 0).unwrap();
            let mut sum = vec![0; BYTES / 8];
            for value in values.iter() {
                let words = value.chunks(8).map(|word| u64::read_from_bytes(word).unwrap());
                sum.iter_mut().zip(words).for_each(|(sum, word)| *sum += word);
            }
            if sum.iter().any(|word| *word != 0) {
                let zeros = PerCpuValues::try_from(vec![[0; BYTES]; values.len()]).unwrap();
                map.set(index, zeros, 0).unwrap();
                sums.insert(index, sum);
            }
        }
        sums
    }
}

fn counter<C: FromBytes>(sum: &[u64]) -> C {
    C::read_from_bytes(sum.as_bytes()).unwrap()
}
