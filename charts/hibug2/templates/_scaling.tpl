{{/* How fast pods come and go: at once when there is work, late when there is none. */}}
{{- define "hibug2.scalingBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
scaleDown:
  stabilizationWindowSeconds: {{ .scaleDownSeconds }}
  policies:
    - type: Pods
      value: 1
      periodSeconds: 60
{{- end -}}

{{/* Workers by the backlog, as an adapter publishes it from Prometheus; all others by CPU. */}}
{{- define "hibug2.hpa" -}}
{{- $scaling := (include "hibug2.values" . | fromYaml).autoscaling -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ include "hibug2.name" . }}
  labels:
    {{- include "hibug2.labels" . | nindent 4 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ include "hibug2.name" . }}
  minReplicas: {{ $scaling.minReplicas }}
  maxReplicas: {{ $scaling.maxReplicas }}
  metrics:
    {{- if eq (.component | default .service) "tagging-workers" }}
    - type: External
      external:
        metric:
          name: hibug2_tagging_backlog
          selector:
            matchLabels:
              namespace: {{ .root.Release.Namespace }}
        target:
          type: AverageValue
          averageValue: {{ $scaling.target | quote }}
    {{- else }}
    - type: Resource
      resource:
        name: cpu
        target:
          type: Utilization
          averageUtilization: {{ $scaling.target }}
    {{- end }}
  behavior:
    {{- include "hibug2.scalingBehavior" $scaling | nindent 4 }}
{{- end -}}

{{/* Every replica of the tagging service reports the one backlog there is, hence max; its kinds add up. */}}
{{- define "hibug2.keda" -}}
{{- $scaling := (include "hibug2.values" . | fromYaml).autoscaling -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ include "hibug2.name" . }}
  labels:
    {{- include "hibug2.labels" . | nindent 4 }}
spec:
  scaleTargetRef:
    name: {{ include "hibug2.name" . }}
  minReplicaCount: {{ $scaling.minReplicas }}
  maxReplicaCount: {{ $scaling.maxReplicas }}
  pollingInterval: 10
  cooldownPeriod: {{ $scaling.scaleDownSeconds }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        {{- include "hibug2.scalingBehavior" $scaling | nindent 8 }}
  triggers:
    - type: prometheus
      metadata:
        serverAddress: {{ .root.Values.metrics.prometheusUrl }}
        query: sum(max by (kind) (hibug2_tagging_backlog{namespace="{{ .root.Release.Namespace }}"}))
        threshold: {{ $scaling.target | quote }}
{{- end -}}
