{{/*
Most helpers take one dict: root (the chart's context), service (gateway, attribute, ...: names the image) and,
for a Deployment that is not the service's server, component (names the objects) and values (its values block).
*/}}

{{- define "hibug2.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "hibug2.name" -}}
{{- printf "%s-%s" (include "hibug2.fullname" .root) (.component | default .service) -}}
{{- end -}}

{{- define "hibug2.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component | default .service }}
{{- end -}}

{{- define "hibug2.labels" -}}
{{ include "hibug2.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "hibug2.values" -}}
{{- get .root.Values (.values | default .service) | toYaml -}}
{{- end -}}

{{/* The settings of one Deployment as the data of its ConfigMap. */}}
{{- define "hibug2.settings" -}}
{{- $values := .root.Values -}}
{{- $settings := dict
  "HIBUG2_LISTEN" "0.0.0.0:50051"
  "HIBUG2_METRICS_PORT" "9090"
  "HIBUG2_LOG_LEVEL" $values.logLevel
  "HIBUG2_REFLECTION" (toString $values.reflection)
  "HIBUG2_STORE_URL" $values.store.url
-}}
{{- if not $values.redis.existingSecret -}}
{{- $_ := set $settings "HIBUG2_REDIS_URL" $values.redis.url -}}
{{- end -}}
{{- if has .service (list "gateway" "attribute" "tagging") -}}
{{- $_ := set $settings "HIBUG2_IMAGE_PREFIXES" (join "," $values.images.prefixes) -}}
{{- end -}}
{{- if and $values.llm.baseUrl (has .service (list "attribute" "tagging")) -}}
{{- $_ := set $settings "HIBUG2_LLM_BASE_URL" $values.llm.baseUrl -}}
{{- $_ := set $settings "HIBUG2_LLM_MODEL" $values.llm.model -}}
{{- end -}}
{{- if eq .service "gateway" -}}
{{- $_ := set $settings "HIBUG2_HTTP_PORT" "8080" -}}
{{- range list "attribute" "tagging" "enumeration" "prediction" "repair" -}}
{{- $address := printf "dns:///%s:50051" (include "hibug2.name" (dict "root" $.root "service" .)) -}}
{{- $_ := set $settings (printf "HIBUG2_%s_ADDRESS" (upper .)) $address -}}
{{- end -}}
{{- end -}}
{{- $own := (include "hibug2.values" . | fromYaml).settings | default dict -}}
{{- toYaml (merge dict $own $settings) -}}
{{- end -}}

{{- define "hibug2.configmap" -}}
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ include "hibug2.name" . }}
  labels:
    {{- include "hibug2.labels" . | nindent 4 }}
data:
  {{- include "hibug2.settings" . | nindent 2 }}
{{- end -}}

{{/* Headless but for the gateway: round_robin in the callers needs every pod's address. */}}
{{- define "hibug2.service" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "hibug2.name" . }}
  labels:
    {{- include "hibug2.labels" . | nindent 4 }}
spec:
  {{- if ne .service "gateway" }}
  clusterIP: None
  {{- end }}
  selector:
    {{- include "hibug2.selector" . | nindent 4 }}
  ports:
    - name: grpc
      port: 50051
      targetPort: grpc
      appProtocol: kubernetes.io/h2c
    {{- if eq .service "gateway" }}
    - name: http
      port: 8080
      targetPort: http
      appProtocol: http
    {{- end }}
{{- end -}}

{{- define "hibug2.deployment" -}}
{{- $values := .root.Values -}}
{{- $own := include "hibug2.values" . | fromYaml -}}
{{- $storeClaim := and (hasPrefix "file://" $values.store.url) $values.store.existingClaim -}}
{{- $imagesClaim := and (has .service (list "gateway" "attribute" "tagging")) $values.images.existingClaim -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "hibug2.name" . }}
  labels:
    {{- include "hibug2.labels" . | nindent 4 }}
spec:
  replicas: {{ $own.replicas }}
  selector:
    matchLabels:
      {{- include "hibug2.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "hibug2.selector" . | nindent 8 }}
      annotations:
        checksum/config: {{ include "hibug2.settings" . | sha256sum }}
    spec:
      automountServiceAccountToken: false
      # Service links would add variables such as HIBUG2_GATEWAY_PORT, which read as settings.
      enableServiceLinks: false
      terminationGracePeriodSeconds: 60
      securityContext:
        runAsNonRoot: true
        runAsUser: 10001
        runAsGroup: 10001
        fsGroup: 10001
        fsGroupChangePolicy: OnRootMismatch
        seccompProfile:
          type: RuntimeDefault
      {{- with $values.image.pullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ . }}
        {{- end }}
      {{- end }}
      containers:
        - name: {{ .component | default .service }}
          image: {{ with $values.image.registry }}{{ . }}/{{ end }}hibug2-{{ .service }}:{{ $values.image.tag | default .root.Chart.AppVersion }}
          imagePullPolicy: {{ $values.image.pullPolicy }}
          {{- with .args }}
          args: {{ toJson . }}
          {{- end }}
          envFrom:
            - configMapRef:
                name: {{ include "hibug2.name" . }}
            {{- with $values.store.existingSecret }}
            - secretRef:
                name: {{ . }}
            {{- end }}
          {{- $secrets := dict -}}
          {{- if $values.redis.existingSecret -}}
          {{- $_ := set $secrets "HIBUG2_REDIS_URL" $values.redis -}}
          {{- end -}}
          {{- if and $values.llm.existingSecret (has .service (list "attribute" "tagging")) -}}
          {{- $_ := set $secrets "HIBUG2_LLM_API_KEY" $values.llm -}}
          {{- end -}}
          {{- with $secrets }}
          env:
            {{- range $name, $from := . }}
            - name: {{ $name }}
              valueFrom:
                secretKeyRef:
                  name: {{ $from.existingSecret }}
                  key: {{ $from.key }}
            {{- end }}
          {{- end }}
          ports:
            - name: grpc
              containerPort: 50051
            {{- if eq .service "gateway" }}
            - name: http
              containerPort: 8080
            {{- end }}
            - name: metrics
              containerPort: 9090
          # The kubelet asks grpc.health.v1 itself; a busy process may miss some liveness calls before it is restarted.
          startupProbe:
            grpc:
              port: 50051
            periodSeconds: 2
            failureThreshold: 60
          readinessProbe:
            grpc:
              port: 50051
            periodSeconds: 5
            timeoutSeconds: 2
          livenessProbe:
            grpc:
              port: 50051
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          resources:
            {{- toYaml $own.resources | nindent 12 }}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: [ALL]
          volumeMounts:
            - name: tmp
              mountPath: /tmp
            {{- if $storeClaim }}
            - name: store
              mountPath: {{ trimPrefix "file://" $values.store.url }}
            {{- end }}
            {{- if $imagesClaim }}
            - name: images
              mountPath: {{ $values.images.mountPath }}
              readOnly: true
            {{- end }}
      volumes:
        - name: tmp
          emptyDir:
            sizeLimit: 2Gi
        {{- if $storeClaim }}
        - name: store
          persistentVolumeClaim:
            claimName: {{ $values.store.existingClaim }}
        {{- end }}
        {{- if $imagesClaim }}
        - name: images
          persistentVolumeClaim:
            claimName: {{ $values.images.existingClaim }}
            readOnly: true
        {{- end }}
{{- end -}}
