//! The programs as the kernel runs them on single packets (`BPF_PROG_TEST_RUN`), with maps filled as the
//! host's.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::process::Command;
use std::sync::atomic::Ordering;

use aya::maps::{HashMap, LpmTrie, Map, MapData, RingBuf, lpm_trie::Key};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use thyra_datapath::Hook;
use thyra_datapath_abi::datagram::{DatagramBucket4, DatagramBucket6};
use thyra_datapath_abi::flow::{FLOW4_WORDS, FLOW6_WORDS, FlowBucket4, FlowBucket6};
use thyra_datapath_abi::limits::{DATAGRAM_BUCKETS, FLOW_BUCKETS, MAX_ENDPOINTS, OUTBOUND_BUDGET};
use thyra_datapath_abi::{
    Control, CpuCounters, EndpointRecord, Event, Flow4, Flow6, FlowState, Reason, State, maps,
};
use thyra_datapath_engine::datagram_table::{self, Key as DatagramKey};
use thyra_datapath_engine::datagram_words::DatagramWords;
use thyra_datapath_engine::flow_table::{self, Key as TableKey};
use thyra_datapath_engine::flow_words::FlowWords;
use thyra_datapath_engine::flows::FlowTable;
use thyra_datapath_engine::host::{HostNode, Ledger};
use thyra_datapath_engine::{BANK_WORDS, BankImage, Table, Tables as _};
use zerocopy::{FromBytes, IntoBytes};

use crate::case::{self, Case, Datagram, Key as FlowKey, Program, Remembered, key, line4, line6};
use crate::memory::Memory;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/thyra.bpf.o"));

/// Interfaces that a packet can be at; test-run looks them up in the thread's network namespace.
const LINKS: [(u32, u32); 5] = [(2, 3), (4, 5), (6, 7), (8, 9), (10, 11)];

/// The kernel's own limit is a million; versions differ in what they need for the same program (6.18: 300,000, 6.1:
/// 360,000; with local redirect 343,000 and 384,000), and an emulated CPU takes seconds for that.
const VERIFIER_BUDGET: u32 = 500_000;

/// Offsets in `struct __sk_buff` (include/uapi/linux/bpf.h) and its length.
const CONTEXT: usize = 192;
const MARK: usize = 8;
const INGRESS: usize = 36;
const IFINDEX: usize = 40;

/// Where things lie in the maps, in words.
const DATAGRAMS: usize = MAX_ENDPOINTS * DATAGRAM_BUCKETS;
const WORD: usize = size_of::<u64>();
pub(crate) const CONTROL: usize = offset_of!(State, control) / WORD;
const SEED: usize = offset_of!(State, flow_seed) / WORD;
const BUDGET: usize = offset_of!(State, outbound_budget) / WORD;
const COUNTS: usize = offset_of!(State, outbound) / WORD;
const RECORDS: usize = offset_of!(State, endpoints) / WORD;
const INTERFACES: usize = offset_of!(State, ifindex) / WORD;
const CPU_WORDS: usize = size_of::<CpuCounters>() / WORD;

/// Loaded programs with their own maps.
pub(crate) struct Kernel {
    ebpf: Ebpf,
    state: Memory,
    banks: Memory,
    counters: Memory,
    outbound4: Memory,
    outbound6: Memory,
    datagrams4: Memory,
    datagrams6: Memory,
}

/// What the kernel did with a packet.
pub(crate) struct Run {
    /// What the program returned.
    pub(crate) code: i32,
    /// The packet afterwards.
    pub(crate) bytes: Vec<u8>,
}

/// Whether test-run takes a frame: newer kernels refuse one that says IP and ends before its header does.
pub(crate) fn takes(frame: &[u8]) -> bool {
    let headers = match frame[12..14] {
        [0x08, 0x00] => 20,
        [0x86, 0xdd] => 40,
        _ => 0,
    };
    frame.len() >= 14 + headers
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
    /// Loads the object that ships with this build.
    pub(crate) fn load() -> Self {
        let mut loader = EbpfLoader::new();
        let cpus = aya::util::nr_cpus().unwrap();
        loader.map_max_entries(maps::COUNTERS, u32::try_from(cpus).unwrap());
        let mut ebpf = loader.load(OBJECT).unwrap();
        // Those of `--hook=pod` are for kernels with tcx links.
        let inside = [maps::ORIGIN, maps::TO_POD_ENTRY, maps::TO_POD_INSIDE];
        let inside = inside.iter().filter(|_| Hook::newest() == Hook::Tcx).copied();
        let everywhere = [
            maps::TO_POD,
            maps::FROM_POD,
            maps::TO_POD_DIRECT,
            maps::FROM_POD_DIRECT,
        ];
        for name in everywhere.into_iter().chain(inside) {
            let program: &mut SchedClassifier = ebpf.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap_or_else(|e| panic!("{name}: {e:?}"));
            let read = program.info().unwrap().verified_instruction_count().unwrap_or(0);
            println!("{name}: the verifier read {read} instructions");
            assert!(read < VERIFIER_BUDGET, "{name}: {read}");
        }
        let memory = |name, words| match ebpf.map(name) {
            Some(Map::Array(map)) => Memory::new(map, words),
            other => panic!("`{name}` is {other:?}"),
        };
        let mut kernel = Self {
            state: memory(maps::STATE, size_of::<State>() / WORD),
            banks: memory(maps::BANKS, 2 * BANK_WORDS),
            counters: memory(maps::COUNTERS, cpus * CPU_WORDS),
            outbound4: memory(maps::OUTBOUND4, FLOW_BUCKETS * size_of::<FlowBucket4>() / WORD),
            outbound6: memory(maps::OUTBOUND6, FLOW_BUCKETS * size_of::<FlowBucket6>() / WORD),
            datagrams4: memory(maps::DATAGRAMS4, DATAGRAMS * size_of::<DatagramBucket4>() / WORD),
            datagrams6: memory(maps::DATAGRAMS6, DATAGRAMS * size_of::<DatagramBucket6>() / WORD),
            ebpf,
        };
        kernel.state.words()[SEED] = 0x7468_7972_6100_0001;
        kernel.set_budget(None);
        kernel
    }

    /// How many connections a pod may have open; by default as many as the datapath says.
    pub(crate) fn set_budget(&mut self, budget: Option<u64>) {
        self.state.words()[BUDGET] = budget.unwrap_or(OUTBOUND_BUDGET);
    }

    fn hash<K: aya::Pod>(&mut self, name: &str) -> HashMap<&mut MapData, K, u64> {
        HashMap::try_from(self.ebpf.map_mut(name).unwrap()).unwrap()
    }

    /// Writes `image` into one bank and makes it live, with the flags of `control`.
    pub(crate) fn fill(&mut self, image: &BankImage, bank: u32, control: Control) {
        let first = usize::try_from(bank).unwrap() * BANK_WORDS;
        self.banks.words()[first..first + BANK_WORDS].fill(0);
        for table in Table::ALL {
            let words = image.words(table);
            let start = first + table.start();
            self.banks.words()[start..start + words.len()].copy_from_slice(words);
        }
        let mut blocks: LpmTrie<_, [u8; 8], u32> =
            LpmTrie::try_from(self.ebpf.map_mut(maps::BLOCKS4).unwrap()).unwrap();
        let stale: Vec<_> = blocks.keys().map(Result::unwrap).collect();
        stale.iter().for_each(|key| blocks.remove(key).unwrap());
        for (key, class) in image.blocks4(bank) {
            let data = <[u8; 8]>::read_from_bytes(&key.as_bytes()[4..]).unwrap();
            blocks.insert(&Key::new(key.prefix_len, data), class, 0).unwrap();
        }
        let mut blocks: LpmTrie<_, [u8; 20], u32> =
            LpmTrie::try_from(self.ebpf.map_mut(maps::BLOCKS6).unwrap()).unwrap();
        let stale: Vec<_> = blocks.keys().map(Result::unwrap).collect();
        stale.iter().for_each(|key| blocks.remove(key).unwrap());
        for (key, class) in image.blocks6(bank) {
            let data = <[u8; 20]>::read_from_bytes(&key.as_bytes()[4..]).unwrap();
            blocks.insert(&Key::new(key.prefix_len, data), class, 0).unwrap();
        }
        self.control(Control::new(control.generation(), bank, control.0));
    }

    /// The same memory once more, for whoever switches while programs run: its word `CONTROL`.
    pub(crate) fn state_again(&self) -> Memory {
        match self.ebpf.map(maps::STATE) {
            Some(Map::Array(map)) => Memory::new(map, size_of::<State>() / WORD),
            other => panic!("`{}` is {other:?}", maps::STATE),
        }
    }

    /// Stores the control word.
    pub(crate) fn control(&mut self, control: Control) {
        self.state.words()[CONTROL] = control.0;
    }

    /// Writes the records of a node's endpoints.
    pub(crate) fn attach(&mut self, node: &HostNode) {
        let state = self.state.words();
        for endpoint in 1..16_u16 {
            let record: [u64; size_of::<EndpointRecord>() / WORD] =
                zerocopy::transmute!(*(&node).record(endpoint));
            let first = RECORDS + usize::from(endpoint) * record.len();
            state[first..first + record.len()].copy_from_slice(&record);
        }
        for word in 0..4_u32 {
            let of = |i| u64::from((&node).endpoint_in(word * 4 + i)) << (16 * i);
            state[INTERFACES + usize::try_from(word).unwrap()] = (0..4).map(of).sum();
        }
    }

    /// Replaces what is remembered of connections.
    pub(crate) fn remember(&mut self, lines: &[String]) {
        self.outbound4.words().fill(0);
        self.outbound6.words().fill(0);
        self.state.words()[COUNTS..][..MAX_ENDPOINTS].fill(0);
        empty::<{ size_of::<Flow4>() }>(&mut self.hash(maps::HOST_FLOWS4));
        empty::<{ size_of::<Flow6>() }>(&mut self.hash(maps::HOST_FLOWS6));
        for endpoint in 0..16 {
            for table in self.datagrams() {
                table.clear(endpoint);
            }
        }
        for line in lines {
            if let Some(Datagram { endpoint, key, flags }) = Datagram::parse(line) {
                let [four, six] = self.datagrams();
                let noted = match key {
                    case::DatagramKey::V4(key) => datagram_table::note(
                        &four,
                        &DatagramKey::<1>::new(zerocopy::transmute!(key), endpoint, self.seed()),
                        flags,
                    ),
                    case::DatagramKey::V6(key) => datagram_table::note(
                        &six,
                        &DatagramKey::<3>::new(zerocopy::transmute!(key), endpoint, self.seed()),
                        flags,
                    ),
                };
                assert!(noted, "`{line}` does not fit");
                continue;
            }
            let flow = Remembered::parse(line);
            let state = FlowState::live(flow.flags, 0, 0).0;
            match (key(&flow), flow.table) {
                (FlowKey::V4(key), FlowTable::Outbound) => {
                    let table = self.outbound(Family::V4);
                    assert!(flow_table::open(
                        &table,
                        &TableKey::v4(&key, self.seed()),
                        flow.flags
                    ));
                }
                (FlowKey::V6(key), FlowTable::Outbound) => {
                    let table = self.outbound(Family::V6);
                    assert!(flow_table::open(
                        &table,
                        &TableKey::v6(&key, self.seed()),
                        flow.flags
                    ));
                }
                (FlowKey::V4(key), FlowTable::Host) => {
                    let key: [u8; size_of::<Flow4>()] = zerocopy::transmute!(key);
                    let mut map = self.hash::<[u8; size_of::<Flow4>()]>(maps::HOST_FLOWS4);
                    map.insert(key, state, 0).unwrap();
                }
                (FlowKey::V6(key), FlowTable::Host) => {
                    let key: [u8; size_of::<Flow6>()] = zerocopy::transmute!(key);
                    let mut map = self.hash::<[u8; size_of::<Flow6>()]>(maps::HOST_FLOWS6);
                    map.insert(key, state, 0).unwrap();
                }
            }
        }
    }

    /// What is remembered of connections, as cases write it.
    pub(crate) fn flows(&mut self) -> Vec<String> {
        let [four, six] = self.datagrams();
        let mut lines = case::datagrams(&four, &six);
        for entry in self.outbound(Family::V4).entries::<FLOW4_WORDS>() {
            lines.push(line4(
                FlowTable::Outbound,
                &zerocopy::transmute!(entry.key),
                &entry.state,
            ));
        }
        for entry in self.outbound(Family::V6).entries::<FLOW6_WORDS>() {
            lines.push(line6(
                FlowTable::Outbound,
                &zerocopy::transmute!(entry.key),
                &entry.state,
            ));
        }
        for entry in self.hash::<[u8; size_of::<Flow4>()]>(maps::HOST_FLOWS4).iter() {
            let (key, state) = entry.unwrap();
            lines.push(line4(
                FlowTable::Host,
                &zerocopy::transmute!(key),
                &FlowState(state),
            ));
        }
        for entry in self.hash::<[u8; size_of::<Flow6>()]>(maps::HOST_FLOWS6).iter() {
            let (key, state) = entry.unwrap();
            lines.push(line6(
                FlowTable::Host,
                &zerocopy::transmute!(key),
                &FlowState(state),
            ));
        }
        lines.sort();
        lines
    }

    fn seed(&self) -> u64 {
        self.state.shared()[SEED].load(Ordering::Relaxed)
    }

    fn datagrams(&self) -> [DatagramWords<'_>; 2] {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let seconds = u64::try_from(now.tv_sec).unwrap();
        let now_ns = seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap();
        [&self.datagrams4, &self.datagrams6].map(|table| DatagramWords {
            buckets: table.shared(),
            now_ns,
        })
    }

    fn outbound(&self, family: Family) -> FlowWords<'_> {
        FlowWords {
            buckets: match family {
                Family::V4 => self.outbound4.shared(),
                Family::V6 => self.outbound6.shared(),
            },
            counts: &self.state.shared()[COUNTS..][..MAX_ENDPOINTS],
            budget: OUTBOUND_BUDGET,
            now_ns: 0,
        }
    }

    /// Runs a packet in the place of a case's own.
    pub(crate) fn run(&mut self, case: &Case, frame: &[u8], mark: u32) -> Run {
        let program = match case.program {
            Program::ToPod => maps::TO_POD,
            Program::FromPod => maps::FROM_POD,
            Program::ToPodDirect => maps::TO_POD_DIRECT,
            Program::FromPodDirect => maps::FROM_POD_DIRECT,
        };
        self.run_at(program, (case.at, case.ingress()), frame, mark)
    }

    /// Runs a packet at interface `at`, come in by `ingress`.
    pub(crate) fn run_at(
        &mut self,
        program: &str,
        (at, ingress): (u32, u32),
        frame: &[u8],
        mark: u32,
    ) -> Run {
        let mut context = [0; CONTEXT];
        context[MARK..MARK + 4].copy_from_slice(&mark.to_ne_bytes());
        context[INGRESS..INGRESS + 4].copy_from_slice(&ingress.to_ne_bytes());
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&at.to_ne_bytes());
        let mut out = vec![0; 4096];
        let program: &SchedClassifier = self.ebpf.program(program).unwrap().try_into().unwrap();
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let result = program.test_run(options).unwrap();
        out.truncate(usize::try_from(result.data_size_out).unwrap());
        let code = i32::from_ne_bytes(result.return_value.to_ne_bytes());
        Run { code, bytes: out }
    }

    /// Takes everything that was counted and reported since the last call.
    pub(crate) fn take_ledger(&mut self) -> Ledger {
        let (ledger, lost) = self.take_any_ledger();
        assert_eq!(0, lost, "events were lost");
        ledger
    }

    /// The same with the number of events that were lost.
    pub(crate) fn take_any_ledger(&mut self) -> (Ledger, u64) {
        let verdicts = self.take(offset_of!(CpuCounters, verdicts), 16);
        let reasons = self.take(offset_of!(CpuCounters, reasons), 256);
        let endpoints = self.take(offset_of!(CpuCounters, endpoints), 16);
        let lost: BTreeMap<_, u64> = self.take(offset_of!(CpuCounters, lost), 1);
        let mut ring = RingBuf::try_from(self.ebpf.map_mut(maps::EVENTS).unwrap()).unwrap();
        let mut events = Vec::new();
        while let Some(item) = ring.next() {
            events.push(Event::read_from_bytes(&item).unwrap());
        }
        let reason = |index: u16| Reason::from_number(u8::try_from(index).unwrap()).expect("a known reason");
        let ledger = Ledger {
            verdicts,
            reasons: reasons
                .into_iter()
                .map(|(i, counter)| (reason(i), counter))
                .collect(),
            endpoints,
            events,
        };
        (ledger, lost.into_values().sum())
    }

    /// The first `count` counters of a table that begins `offset` bytes into an element, summed over the CPUs,
    /// without those that are zero; all are zero afterwards.
    fn take<C: FromBytes>(&mut self, offset: usize, count: u16) -> BTreeMap<u16, C> {
        let each = size_of::<C>() / WORD;
        let mut sums = BTreeMap::new();
        for index in 0..count {
            let first = offset / WORD + usize::from(index) * each;
            let mut sum = vec![0; each];
            for cpu in self.counters.words().chunks_mut(CPU_WORDS) {
                let counter = &mut cpu[first..first + each];
                sum.iter_mut().zip(&*counter).for_each(|(sum, word)| *sum += word);
                counter.fill(0);
            }
            if sum.iter().any(|word| *word != 0) {
                sums.insert(index, C::read_from_bytes(sum.as_bytes()).unwrap());
            }
        }
        sums
    }
}

#[derive(Clone, Copy)]
enum Family {
    V4,
    V6,
}

fn empty<const K: usize>(map: &mut HashMap<&mut MapData, [u8; K], u64>) {
    let keys: Vec<_> = map.keys().map(Result::unwrap).collect();
    keys.iter().for_each(|key| map.remove(key).unwrap());
}
