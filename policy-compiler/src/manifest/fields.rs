//! The fields of the Kubernetes kinds that Thyra reads, as of Kubernetes 1.36 and Istio 1.31.
//!
//! Invariant: every field that those versions know is here, also those that Thyra has no use for: a real
//! manifest runs unchanged. Sub-objects that can't change a verdict are `Any`.

use super::shape::{
    Field,
    Shape::{Any, Boolean, Fields, Labels, List, Map, Text, TextOrWhole, Whole},
    TEXTS,
};

pub(super) const METADATA: &[Field] = &[
    ("name", Text),
    ("generateName", Text),
    ("namespace", Text),
    ("selfLink", Text),
    ("uid", Text),
    ("resourceVersion", Text),
    ("generation", Whole),
    ("creationTimestamp", Text),
    ("deletionTimestamp", Text),
    ("deletionGracePeriodSeconds", Whole),
    ("labels", Labels),
    ("annotations", Labels),
    ("ownerReferences", Any),
    ("finalizers", TEXTS),
    ("clusterName", Text),
    ("managedFields", Any),
];

pub(super) const NAMESPACE: &[Field] = &[("spec", Fields(&[("finalizers", TEXTS)])), ("status", Any)];

pub(super) const SERVICE_ACCOUNT: &[Field] = &[
    ("secrets", Any),
    ("imagePullSecrets", Any),
    ("automountServiceAccountToken", Boolean),
];

pub(super) const NODE: &[Field] = &[
    (
        "spec",
        Fields(&[
            ("podCIDR", Text),
            ("podCIDRs", TEXTS),
            ("providerID", Text),
            ("unschedulable", Boolean),
            ("taints", Any),
            ("configSource", Any),
            ("externalID", Text),
        ]),
    ),
    ("status", Any),
];

pub(super) const CONFIG_MAP: &[Field] = &[("immutable", Boolean), ("data", Labels), ("binaryData", Labels)];

const CONTAINER_PORT: &[Field] = &[
    ("name", Text),
    ("hostPort", Whole),
    ("containerPort", Whole),
    ("protocol", Text),
    ("hostIP", Text),
];

const CONTAINER: &[Field] = &[
    ("name", Text),
    ("image", Text),
    ("command", TEXTS),
    ("args", TEXTS),
    ("workingDir", Text),
    ("ports", List(&Fields(CONTAINER_PORT))),
    ("envFrom", Any),
    ("env", Any),
    ("resources", Any),
    ("resizePolicy", Any),
    ("restartPolicy", Text),
    ("restartPolicyRules", Any),
    ("volumeMounts", Any),
    ("volumeDevices", Any),
    ("livenessProbe", Any),
    ("readinessProbe", Any),
    ("startupProbe", Any),
    ("lifecycle", Any),
    ("terminationMessagePath", Text),
    ("terminationMessagePolicy", Text),
    ("imagePullPolicy", Text),
    ("securityContext", Any),
    ("stdin", Boolean),
    ("stdinOnce", Boolean),
    ("tty", Boolean),
];

const POD_SPEC: &[Field] = &[
    ("volumes", Any),
    ("initContainers", List(&Fields(CONTAINER))),
    ("containers", List(&Fields(CONTAINER))),
    ("ephemeralContainers", Any),
    ("restartPolicy", Text),
    ("terminationGracePeriodSeconds", Whole),
    ("activeDeadlineSeconds", Whole),
    ("dnsPolicy", Text),
    ("nodeSelector", Labels),
    ("serviceAccountName", Text),
    ("serviceAccount", Text),
    ("automountServiceAccountToken", Boolean),
    ("nodeName", Text),
    ("hostNetwork", Boolean),
    ("hostPID", Boolean),
    ("hostIPC", Boolean),
    ("shareProcessNamespace", Boolean),
    ("securityContext", Any),
    ("imagePullSecrets", Any),
    ("hostname", Text),
    ("subdomain", Text),
    ("affinity", Any),
    ("schedulerName", Text),
    ("tolerations", Any),
    ("hostAliases", Any),
    ("priorityClassName", Text),
    ("priority", Whole),
    ("dnsConfig", Any),
    ("readinessGates", Any),
    ("runtimeClassName", Text),
    ("enableServiceLinks", Boolean),
    ("preemptionPolicy", Text),
    ("overhead", Any),
    ("topologySpreadConstraints", Any),
    ("setHostnameAsFQDN", Boolean),
    ("os", Any),
    ("hostUsers", Boolean),
    ("schedulingGates", Any),
    ("resourceClaims", Any),
    ("resources", Any),
    ("hostnameOverride", Text),
    ("schedulingGroup", Any),
    ("workloadRef", Any),
];

const POD_STATUS: &[Field] = &[
    ("observedGeneration", Whole),
    ("phase", Text),
    ("conditions", Any),
    ("message", Text),
    ("reason", Text),
    ("nominatedNodeName", Text),
    ("hostIP", Text),
    ("hostIPs", Any),
    ("podIP", Text),
    ("podIPs", List(&Fields(&[("ip", Text)]))),
    ("startTime", Text),
    ("initContainerStatuses", Any),
    ("containerStatuses", Any),
    ("qosClass", Text),
    ("ephemeralContainerStatuses", Any),
    ("resize", Text),
    ("resourceClaimStatuses", Any),
    ("extendedResourceClaimStatus", Any),
    ("allocatedResources", Any),
    ("resources", Any),
    ("nodeAllocatableResourceClaimStatuses", Any),
];

const TEMPLATE: &[Field] = &[("metadata", Fields(METADATA)), ("spec", Fields(POD_SPEC))];

/// `metav1.LabelSelector`.
const SELECTOR: &[Field] = &[
    ("matchLabels", Labels),
    (
        "matchExpressions",
        List(&Fields(&[("key", Text), ("operator", Text), ("values", TEXTS)])),
    ),
];

pub(super) const POD: &[Field] = &[("spec", Fields(POD_SPEC)), ("status", Fields(POD_STATUS))];

pub(super) const DEPLOYMENT: &[Field] = &[
    (
        "spec",
        Fields(&[
            ("replicas", Whole),
            ("selector", Fields(SELECTOR)),
            ("template", Fields(TEMPLATE)),
            ("strategy", Any),
            ("minReadySeconds", Whole),
            ("revisionHistoryLimit", Whole),
            ("paused", Boolean),
            ("progressDeadlineSeconds", Whole),
        ]),
    ),
    ("status", Any),
];

pub(super) const STATEFUL_SET: &[Field] = &[
    (
        "spec",
        Fields(&[
            ("replicas", Whole),
            ("selector", Fields(SELECTOR)),
            ("template", Fields(TEMPLATE)),
            ("volumeClaimTemplates", Any),
            ("serviceName", Text),
            ("podManagementPolicy", Text),
            ("updateStrategy", Any),
            ("revisionHistoryLimit", Whole),
            ("minReadySeconds", Whole),
            ("persistentVolumeClaimRetentionPolicy", Any),
            ("ordinals", Any),
        ]),
    ),
    ("status", Any),
];

pub(super) const DAEMON_SET: &[Field] = &[
    (
        "spec",
        Fields(&[
            ("selector", Fields(SELECTOR)),
            ("template", Fields(TEMPLATE)),
            ("updateStrategy", Any),
            ("minReadySeconds", Whole),
            ("revisionHistoryLimit", Whole),
        ]),
    ),
    ("status", Any),
];

pub(super) const REPLICA_SET: &[Field] = &[
    (
        "spec",
        Fields(&[
            ("replicas", Whole),
            ("minReadySeconds", Whole),
            ("selector", Fields(SELECTOR)),
            ("template", Fields(TEMPLATE)),
        ]),
    ),
    ("status", Any),
];

const JOB_SPEC: &[Field] = &[
    ("parallelism", Whole),
    ("completions", Whole),
    ("activeDeadlineSeconds", Whole),
    ("podFailurePolicy", Any),
    ("successPolicy", Any),
    ("backoffLimit", Whole),
    ("backoffLimitPerIndex", Whole),
    ("maxFailedIndexes", Whole),
    ("selector", Fields(SELECTOR)),
    ("manualSelector", Boolean),
    ("template", Fields(TEMPLATE)),
    ("ttlSecondsAfterFinished", Whole),
    ("completionMode", Text),
    ("suspend", Boolean),
    ("podReplacementPolicy", Text),
    ("managedBy", Text),
    ("scheduling", Any),
];

pub(super) const JOB: &[Field] = &[("spec", Fields(JOB_SPEC)), ("status", Any)];

pub(super) const CRON_JOB: &[Field] = &[
    (
        "spec",
        Fields(&[
            ("schedule", Text),
            ("timeZone", Text),
            ("startingDeadlineSeconds", Whole),
            ("concurrencyPolicy", Text),
            ("suspend", Boolean),
            (
                "jobTemplate",
                Fields(&[("metadata", Fields(METADATA)), ("spec", Fields(JOB_SPEC))]),
            ),
            ("successfulJobsHistoryLimit", Whole),
            ("failedJobsHistoryLimit", Whole),
        ]),
    ),
    ("status", Any),
];

const SERVICE_PORT: &[Field] = &[
    ("name", Text),
    ("protocol", Text),
    ("appProtocol", Text),
    ("port", Whole),
    ("targetPort", TextOrWhole),
    ("nodePort", Whole),
];

pub(super) const SERVICE: &[Field] = &[
    (
        "spec",
        Fields(&[
            ("ports", List(&Fields(SERVICE_PORT))),
            ("selector", Labels),
            ("clusterIP", Text),
            ("clusterIPs", TEXTS),
            ("type", Text),
            ("externalIPs", TEXTS),
            ("sessionAffinity", Text),
            ("loadBalancerIP", Text),
            ("loadBalancerSourceRanges", TEXTS),
            ("externalName", Text),
            ("externalTrafficPolicy", Text),
            ("healthCheckNodePort", Whole),
            ("publishNotReadyAddresses", Boolean),
            ("sessionAffinityConfig", Any),
            ("ipFamilies", TEXTS),
            ("ipFamilyPolicy", Text),
            ("allocateLoadBalancerNodePorts", Boolean),
            ("loadBalancerClass", Text),
            ("internalTrafficPolicy", Text),
            ("trafficDistribution", Text),
        ]),
    ),
    ("status", Any),
];

pub(super) const WORKLOAD_ENTRY: &[Field] = &[
    (
        "spec",
        Fields(&[
            ("address", Text),
            ("ports", Map(&Whole)),
            ("labels", Labels),
            ("network", Text),
            ("locality", Text),
            ("weight", Whole),
            ("serviceAccount", Text),
        ]),
    ),
    ("status", Any),
];

/// One of `jwtRules`.
pub(super) const JWT_RULE: &[Field] = &[
    ("issuer", Text),
    ("audiences", TEXTS),
    ("jwksUri", Text),
    ("jwks_uri", Text),
    ("jwks", Text),
    ("fromHeaders", List(&Fields(&[("name", Text), ("prefix", Text)]))),
    ("fromParams", TEXTS),
    ("fromCookies", TEXTS),
    ("outputPayloadToHeader", Text),
    (
        "outputClaimToHeaders",
        List(&Fields(&[("header", Text), ("claim", Text)])),
    ),
    ("forwardOriginalToken", Boolean),
    ("timeout", Text),
    ("spaceDelimitedClaims", TEXTS),
];

/// `jwtRules` of a RequestAuthentication.
pub(super) const JWT_RULES: super::shape::Shape = List(&Fields(JWT_RULE));
